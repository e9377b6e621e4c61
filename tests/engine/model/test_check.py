"""The load-time check accepts every family, and refuses a model with any one piece wrong."""

import dataclasses

import pytest
import torch

from engine.errors import ModelError
from engine.kernels.attend_token import Partial
from engine.model.check import _tokens, check
from engine.model.hf import HFLayer, HFModel
from tests.engine.families import CASES, build


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_is_reproduced_and_left_as_it_was(family, dtype):
    module = build(family, dtype=dtype)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    check(HFModel(module))
    after = module.state_dict()
    assert all(after[n].dtype == w.dtype and torch.equal(after[n], w) for n, w in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_at_least_64_tokens_are_compared_and_more_for_a_window():
    assert _tokens(HFModel(build("llama"))) == 64
    assert _tokens(HFModel(build("mistral-window", sliding_window=100))) == 116
    assert _tokens(HFModel(build("llama", max_position_embeddings=32))) == 32


def attention(**change):
    def spoil(layer: HFLayer) -> None:
        now = layer.attention
        layer.attention = dataclasses.replace(now, **{k: f(now) for k, f in change.items()})

    return spoil


def rope(**change):
    def spoil(layer: HFLayer) -> None:
        new = {name: f(layer.rope) for name, f in change.items()}
        layer.rope = dataclasses.replace(layer.rope, **new)

    return spoil


def drop(name):
    def spoil(layer: HFLayer) -> None:
        assert getattr(layer, name) is not None
        setattr(layer, name, lambda x: x)

    return spoil


def family_field(**change):
    def spoil(layer: HFLayer) -> None:
        layer._family = dataclasses.replace(layer._family, **change)

    return spoil


def nudge(values):
    values = values.clone()
    values[-1] *= 1.5
    return values


WRONG = {
    "scale": ("llama", attention(scale=lambda a: a.scale * 1.02)),
    "window one off": ("mistral-window", attention(window=lambda a: a.window + 1)),
    "window dropped": ("mistral-window", attention(window=lambda a: None)),
    "window invented": ("llama", attention(window=lambda a: 30)),
    "softcap dropped": ("gemma2", attention(softcap=lambda a: None)),
    "attention factor": ("qwen2-yarn", rope(scaling=lambda r: r.scaling * 1.01)),
    "pairs": ("glm4", rope(interleaved=lambda r: not r.interleaved)),
    "one frequency": ("llama", rope(inv_freq=lambda r: nudge(r.inv_freq))),
    "q and k norm": ("qwen3", family_field(qk_norm=None)),
    "norm over the row": ("olmo2", family_field(qk_norm=None)),
    "input norm": ("llama", drop("_attn_in")),
    "norm after attention": ("gemma2", drop("_attn_out")),
    "norm after attention, glm": ("glm4", drop("_attn_out")),
    "norm before mlp": ("qwen3-moe", drop("_mlp_in")),
    "norm after mlp": ("olmo2-gqa", drop("_mlp_out")),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_a_layer_with_one_piece_wrong_is_refused(name, where):
    family, spoil = WRONG[name]
    model = HFModel(build(family))
    spoil(model.layers[where])
    with pytest.raises(ModelError, match="not reproduced"):
        check(model)


def test_wrong_logits_and_a_missing_bias_are_refused():
    model = HFModel(build("gemma2"))
    model._softcap = None
    with pytest.raises(ModelError, match="logits"):
        check(model)
    model = HFModel(build("llama-bias"))
    wrong = build("llama-bias").model.layers[1].self_attn
    wrong.k_proj.bias = None
    model.layers[1]._attn = wrong
    with pytest.raises(ModelError, match="layer 1"):
        check(model)


def test_a_grouping_of_heads_that_is_wrong_is_refused():
    model = HFModel(build("llama"))
    layer, right = model.layers[2], model.layers[2].qkv

    def shuffled(x):
        q, k, v = right(x)
        return type(right(x))(q.flip(0), k, v)

    layer.qkv = shuffled
    with pytest.raises(ModelError, match="layer 2"):
        check(model)


def test_a_decode_kernel_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr("engine.attention.serves", lambda *_: True)
    monkeypatch.setattr(
        "engine.attention.attend_token_native", lambda q, *_: Partial(q + 7, q[:, 0])
    )
    with pytest.raises(ModelError, match="layer 0"):
        check(HFModel(build("llama")))


def test_a_product_of_few_rows_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr("engine.model.check.serves", lambda *_: True)
    monkeypatch.setattr("engine.model.check.project_native", lambda x, w: x @ w.T * 1.1)
    with pytest.raises(ModelError, match="product"):
        check(HFModel(build("llama", dtype=torch.bfloat16)))


def test_nan_is_refused():
    module = build("llama")
    module.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError):
        check(HFModel(module))


def test_the_check_leaves_no_hook_behind_when_it_refuses():
    model = HFModel(build("llama", dtype=torch.bfloat16))
    model.layers[0].attention = dataclasses.replace(model.layers[0].attention, scale=1.0)
    with pytest.raises(ModelError):
        check(model)
    assert {w.dtype for w in model.module.parameters()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
