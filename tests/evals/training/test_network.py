"""The network: the same function as the Llama it is exported as."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from evals.training.network import Network, Shape, export, load
from evals.training.vocabulary import TOKENS

SHAPE = Shape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, mlp=48)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Network(SHAPE)
    for weight in network.parameters():
        weight.data = weight.data.bfloat16().float()  # as it is exported: nothing is lost
    return network


@pytest.fixture(scope="module")
def folder(network, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    export(network, tokenizer, out)
    return out


def test_the_exported_llama_gives_the_same_logits(network, folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, TOKENS, (2, 50))
    ours = network.lm_head(network(ids, torch.arange(50).expand(2, 50)))
    assert (ours - model(ids).logits).abs().max() < 1e-4


def test_what_is_exported_is_bf16_and_ends_where_an_answer_ends(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == SHAPE.positions


def test_short_and_long_windows_are_the_same_function(network):
    ids, positions = torch.randint(3, TOKENS, (1, 40)), torch.arange(40)[None]
    nothing = torch.zeros(1, 40, 40, dtype=torch.bool)
    assert torch.allclose(network(ids, positions), network(ids, positions, nothing), atol=1e-5)


def test_a_query_does_not_see_what_is_hidden_from_it(network):
    ids, positions = torch.randint(3, TOKENS, (1, 40)), torch.arange(40)[None]
    hidden = torch.zeros(1, 40, 40, dtype=torch.bool)
    hidden[:, 30:, 5:8] = True
    hidden[:, 8:30, 5:8] = True
    changed = ids.clone()
    changed[:, 5:8] = 7
    one, other = network(ids, positions, hidden), network(changed, positions, hidden)
    assert torch.equal(one[:, 8:], other[:, 8:])
    assert not torch.equal(network(ids, positions)[:, 8:], network(changed, positions)[:, 8:])


def test_a_shift_of_all_positions_changes_nothing(network):
    ids, positions = torch.randint(3, TOKENS, (1, 40)), torch.arange(40)[None]
    assert torch.allclose(network(ids, positions), network(ids, positions + 900), atol=1e-3)


def test_an_exported_network_comes_back(network, folder):
    again = load(folder)
    assert again.shape == SHAPE
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_a_sharpened_network_is_exported_with_greater_scores(network, tokenizer, tmp_path):
    export(network, tokenizer, tmp_path, sharpness=1.5)
    kept, sharp = network.state_dict(), load(tmp_path).state_dict()
    changed = {name for name in kept if not torch.equal(kept[name], sharp[name])}
    assert changed == {f"layers.{layer}.self_attn.q_proj.weight" for layer in range(SHAPE.layers)}
    for name in changed:
        assert torch.equal(sharp[name], (kept[name] * 1.5).bfloat16().float())
