"""A whole step of a batch through the kernels, in Triton's interpreter: as by the definitions."""

import importlib

import pytest
import torch

import engine.batch.layer as batch_layer
from engine.kernels import attend_whole, rms_norm
from kvstore.kernels.append import append_triton
from kvstore.kernels.gather import gather_triton
from native.gpu import interpreted, kernel_modules
from tests.engine.batch.test_batch import Batch, along, small, some_tokens
from tests.engine.families import build, prompt
from tests.test_imports import ROOT

STEPS = 2


@pytest.fixture
def through_kernels(monkeypatch):
    """From now on kernels are chosen as on a GPU."""
    if not interpreted():
        pytest.skip("TRITON_INTERPRET is not set: kernels do not run on a CPU")

    def choose():
        for name in kernel_modules(ROOT):
            module = importlib.import_module(name)
            if hasattr(module, "on_gpu"):
                monkeypatch.setattr(module, "on_gpu", lambda *_: True)
        monkeypatch.setattr(attend_whole, "on_gpu", lambda *_: True)
        monkeypatch.setattr(batch_layer, "gather", gather_triton)
        monkeypatch.setattr(batch_layer, "append", append_triton)
        monkeypatch.setattr(rms_norm, "fits", lambda *_: True)

    return choose


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("headrace", dict(tail=True, keys="int8", values="int4", prefetch="layer")),
        ("shadowkv", {}),
        ("a2ats", {}),
        ("quest", dict(reduce="sum")),
        ("pqcache", {}),
    ],
)
def test_a_step_through_the_kernels_is_that_of_the_definitions(name, changes, through_kernels):
    module = build("llama", num_hidden_layers=2)
    texts, tokens = [prompt(70), prompt(21)], some_tokens(STEPS, 2)
    options = dict(slots=3, capacity=96, room=STEPS)
    with Batch(module, small(name, **changes), **options) as batch:
        want = along(batch, texts, tokens)
    through_kernels()
    with Batch(module, small(name, **changes), **options) as batch:
        got = along(batch, texts, tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_layers_with_a_window_go_through_the_kernels_too(through_kernels):
    module = build("gemma2", num_hidden_layers=2)
    texts, tokens = [prompt(60), prompt(9)], some_tokens(STEPS, 2)
    with Batch(module, small("headrace"), slots=2, capacity=96, room=STEPS) as batch:
        want = along(batch, texts, tokens)
    through_kernels()
    with Batch(module, small("headrace"), slots=2, capacity=96, room=STEPS) as batch:
        got = along(batch, texts, tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
