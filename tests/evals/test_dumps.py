"""A trace holds what the model's own attention saw."""

import pytest
import torch

from engine.attention import attend_token_torch
from engine.engine import Engine
from engine.model.hf import HFModel
from engine.model.pieces import AttentionSpec
from evals.dumps import dump, haystack_tokens
from tests.engine.families import build, prompt


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2-yarn", "glm4"])
def test_attention_over_a_trace_is_the_models_own(family):
    """The layers' outputs, from the trace's q, k and v, are what `transformers` computes."""
    module = build(family)
    model, tokens = HFModel(module), prompt(90)
    seen = {}
    for i, layer in enumerate(module.model.layers):
        projection = layer.self_attn.o_proj
        projection.register_forward_hook(lambda _, x, __, i=i: seen.update({i: x[0][0]}))
    with torch.no_grad():
        module(tokens[None])
    layers = range(model.shape.num_layers)
    for i, trace in enumerate(dump(model, tokens, layers=layers, queries=8, past=20, chunk=31)):
        assert trace.prompt == 82
        for n, length in enumerate(trace.asked):
            kv = trace.rotated.keys[:, :length], trace.values[:, :length]
            out = attend_token_torch(trace.rotated.queries[n], *kv, AttentionSpec(trace.scale))
            torch.testing.assert_close(out.flatten(), seen[i][length - 1], rtol=0, atol=1e-4)


def test_rotated_keys_are_the_windowed_ones_turned_and_past_queries_come_before():
    model, tokens = HFModel(build("llama")), prompt(100)
    [trace] = dump(model, tokens, layers=[1], queries=10, past=30, distance=7)
    turned = trace.turned(trace.windowed.keys)
    torch.testing.assert_close(turned, trace.rotated.keys, rtol=0, atol=1e-5)
    [earlier] = dump(model, tokens, layers=[1], queries=40, past=10, distance=7)
    for name in ("rotated", "windowed"):
        asks = earlier.space(name).queries[:30].transpose(0, 1)
        torch.testing.assert_close(trace.space(name).past, asks, rtol=0, atol=1e-5)


def test_windowed_queries_are_at_one_distance_from_all_keys():
    layer = (model := HFModel(build("llama"))).layers[0]
    tokens = prompt(60)
    [trace] = dump(model, tokens, layers=[0], queries=1, past=5, distance=59)
    q = layer.qkv(model.embed(tokens[-1:])).q
    at = layer.rope.table(torch.tensor([59]))
    want = layer.rope.rotate(q, at)[:, 0]
    torch.testing.assert_close(trace.windowed.queries[0], want, rtol=0, atol=1e-5)
    first = trace.windowed.queries[0].view(trace.values.shape[0], -1, q.shape[-1])
    scores = first @ trace.windowed.keys[:, :1].mT  # the first token is 59 away
    rotated = trace.rotated.queries[0].view_as(first) @ trace.rotated.keys[:, :1].mT
    torch.testing.assert_close(scores, rotated, rtol=0, atol=1e-4)


def test_keys_and_values_are_kept_in_the_dtype_asked_for():
    [trace] = dump(
        HFModel(build("llama")), prompt(50), layers=[0], queries=2, past=3, dtype=torch.bfloat16
    )
    assert (
        trace.values.dtype
        == trace.rotated.keys.dtype
        == trace.windowed.keys.dtype
        == torch.bfloat16
    )
    assert trace.rotated.queries.dtype == torch.float32


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="more than 8 \\+ 42"):
        dump(HFModel(build("llama")), prompt(50), layers=[0], queries=8, past=42)


def test_the_text_ends_in_a_question_and_is_no_longer_than_asked():
    with Engine.from_pretrained("needle-tiny") as engine:
        tokens = haystack_tokens(engine, 2000, seed=1)
        assert 1900 < len(tokens) <= 2000
        text = engine.tokenizer.decode(tokens)
    assert text.count("The special magic number for") == 9
    assert "What is the special magic number for" in text[-200:]
