"""The same answers on a GPU as on the CPU."""

import pytest
import torch

from engine import Engine, EngineConfig
from engine.method import preset
from tests.engine import oracle
from tests.engine.families import CASES, build, prompt
from tests.engine.reader import settings

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")


@pytest.mark.parametrize("family", CASES)
def test_logits_on_a_gpu_are_those_of_the_cpu(family):
    text = prompt(300)
    want = oracle.logits(build(family), text)
    with Engine(build(family).to("cuda")) as engine:
        got = engine.logits(text).cpu()
    torch.testing.assert_close(got, want, rtol=0, atol=oracle.TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3-partial"])
def test_tokens_on_a_gpu_are_those_of_the_cpu_and_again_from_disk(family, tmp_path):
    module, lengths = build(family), [5, 64, 150]
    theirs = oracle.generate(module, [prompt(n) for n in lengths], 100)
    for cached in ([0, 0, 0], [0, 48, 144]):
        with Engine(build(family).to("cuda"), config=settings(tmp_path / "store")) as engine:
            done = engine.generate([prompt(n).tolist() for n in lengths], max_new_tokens=100)
        assert [c.stats.cached_tokens for c in done] == cached
        for n, ours, want in zip(lengths, done, theirs):
            oracle.assert_same_answer(module, prompt(n), ours.tokens, want)


def test_bf16_on_a_gpu_stays_within_twice_the_error_of_torch():
    text = prompt(300)
    want = oracle.logits(build("llama"), text)
    narrow = build("llama", dtype=torch.bfloat16).to("cuda")
    theirs = (oracle.logits(narrow, text.cuda()).float().cpu() - want).abs().max()
    with Engine(narrow) as engine:
        ours = (engine.logits(text).float().cpu() - want).abs().max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("name", ["headrace", "shadowkv", "quest"])
def test_a_sparse_method_on_a_gpu_at_full_budget_is_dense(name):
    module, asked = build("llama"), [prompt(n).tolist() for n in (5, 64, 300)]
    options = {"outlier_chunks": 0} if name == "shadowkv" else {}
    method = preset(name, budget=10_000, hot=1.0, rank=1000, prefetch="layer", options=options)
    with Engine(module) as engine:
        want = engine.generate(asked, max_new_tokens=60)
    config = EngineConfig(method=method, pinned_bytes=64 << 20)
    with Engine(module.to("cuda"), None, config) as engine:
        done = engine.generate(asked, max_new_tokens=60)
    for text, ours, theirs in zip(asked, done, want):
        oracle.assert_same_answer(module, torch.tensor(text), ours.tokens, theirs.tokens)
