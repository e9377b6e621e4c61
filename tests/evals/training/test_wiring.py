"""Wiring: before any training, heads look back where they should, and copying works."""

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from evals.training.network import Network, Shape, rotate
from evals.training.windows import ANSWER, Mix
from evals.training.wiring import wire

SHAPE = Shape(layers=5, mlp=64)
TOKENS = 60


def make(shape=SHAPE, wired=True):
    torch.manual_seed(0)
    network = Network(shape)
    if wired:
        wire(network, torch.Generator().manual_seed(0))
    return network


@pytest.fixture(scope="module")
def network():
    return make()


@torch.no_grad()
def weights(network, layer, ids):
    """Attention weights of a layer."""
    angles = torch.arange(len(ids))[:, None] * network.inverse
    cos, sin = angles.cos(), angles.sin()
    x = network.embed_tokens(ids)[None]
    for before in network.layers[:layer]:
        x = before(x, cos, sin, None)
    attention, x = network.layers[layer].self_attn, network.layers[layer].input_layernorm(x)
    q, k = (
        rotate(p(x).view(len(ids), -1, SHAPE.head_dim).transpose(0, 1), cos, sin)
        for p in (attention.q_proj, attention.k_proj)
    )
    scores = q @ k.repeat_interleave(2, 0).mT / SHAPE.head_dim**0.5
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


@pytest.mark.parametrize(("layer", "distances"), [(0, (1, 2, 3, 4)), (1, (3, 6, 5, 6))])
def test_heads_look_back_by_their_distance(network, layer, distances):
    ids = torch.randint(3, SHAPE.vocabulary, (TOKENS,))
    found = weights(network, layer, ids)
    for head, distance in enumerate(distances):
        assert found[head].diagonal(-distance)[10:].mean() > 0.7


def test_heads_of_layer_2_find_where_the_same_tokens_were_followed(network):
    base = torch.randint(3, SHAPE.vocabulary, (30,))
    found = weights(network, 2, base.repeat(2))
    assert found[2].diagonal(-29)[10:].mean() > 0.8  # the token after the last time


def right(network, windows, tokens=160):
    mix = Mix({"plain": 1.0}, copies=1.0)
    found = []
    for seed in range(4):
        window = windows.draw(mix, tokens, np.random.default_rng(seed))
        with torch.no_grad():
            states = network(torch.tensor(window.ids)[None], torch.arange(tokens)[None])[0]
        places = np.flatnonzero(window.kinds == ANSWER)
        found.append(network.lm_head(states[places - 1]).argmax(-1).numpy() == window.ids[places])
    return np.concatenate(found).mean()


def test_repeated_tokens_are_copied_without_any_training(network, windows):
    assert right(network, windows) > 0.6
    assert right(make(wired=False), windows) < 0.02


@pytest.mark.parametrize("shape", [Shape(width=128), Shape(layers=4), Shape(heads=8)])
def test_a_network_with_no_room_for_the_heads_is_refused(shape):
    with pytest.raises(ConfigError, match="wiring needs"):
        make(shape)
