"""The same answers on a GPU as on the CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from msgspec import structs

from engine import Engine, EngineConfig
from engine.batch.batch import DeviceBatch
from engine.batch.layer import SelectedLayer
from engine.method import preset
from tests.engine import oracle
from tests.engine.blend.requests import CONFIG, POLICIES, blended, segments
from tests.engine.families import CASES, build, prompt
from tests.engine.reader import settings

pytestmark = pytest.mark.gpu


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


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were captured."""
    capture, made = DeviceBatch._capture, []
    monkeypatch.setattr(
        DeviceBatch, "_capture", lambda self: made.append(capture(self)) or made[-1]
    )
    return made


def full(name, **changes):
    options = {"outlier_chunks": 0} if name == "shadowkv" else {}
    given = dict(budget=10_000, hot=2.0, rank=1000, options=options)
    return preset(name, **(given | changes))


def answers(module, asked, method, count, **changes):
    config = EngineConfig(method=method, pinned_bytes=256 << 20, **changes)
    with Engine(module.to("cuda"), None, config) as engine:
        return engine.generate(asked, max_new_tokens=count)


@pytest.mark.parametrize(
    ("name", "family", "prefetch"),
    [
        ("headrace", "llama", "none"),
        ("headrace", "gemma3", "layer"),  # two rotations, and windows
        ("headrace", "gemma2", "none"),  # softcaps
        ("shadowkv", "llama", "layer"),
        ("quest", "llama", "layer"),
        ("pqcache", "llama", "none"),
    ],
)
def test_a_sparse_method_on_a_gpu_at_full_budget_is_dense(name, family, prefetch, graphs):
    if name == "pqcache":
        pytest.importorskip("faiss", reason="codebooks are trained by FAISS")
    module, asked = build(family), [prompt(n).tolist() for n in (5, 64, 300)]
    with Engine(module) as engine:
        want = engine.generate(asked, max_new_tokens=60)
    done = answers(module, asked, full(name, prefetch=prefetch), 60)
    assert len(graphs) == 1
    assert graphs[0] is not None
    for text, ours, theirs in zip(asked, done, want):
        oracle.assert_same_answer(module, torch.tensor(text), ours.tokens, theirs.tokens)


@pytest.mark.parametrize("name", ["headrace", "shadowkv"])
def test_a_sparse_prompt_starts_from_what_is_stored(name, tmp_path):
    """Loaded beside the loop, layer after layer, each moved to the pool when it is complete."""
    module, asked = build("llama"), [prompt(n).tolist() for n in (150, 300)]
    with Engine(module) as engine:
        want = engine.generate(asked, max_new_tokens=60)
    store = {"store": settings(tmp_path / "store").store, "block_tokens": 16}
    for cached in ([0, 0], [144, 288]):
        done = answers(module, asked, full(name), 60, **store)
        assert [c.stats.cached_tokens for c in done] == cached
        for text, ours, theirs in zip(asked, done, want):
            oracle.assert_same_answer(module, torch.tensor(text), ours.tokens, theirs.tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_blend_of_everything_is_a_full_prefill(policy):
    """Also of the chunks that are loaded, in the second turn."""
    module, asked = build("llama"), segments()
    want = oracle.logits(module, torch.tensor(asked.tokens))[-1]
    with Engine(module.to("cuda"), None, CONFIG) as engine:
        for missed in (len(asked.chunks), 0):
            got = blended(engine, asked, policy=policy, share=1.0)
            assert got.report.missed == missed
            torch.testing.assert_close(got.logits.cpu(), want, rtol=0, atol=oracle.TOLERANCE)


@pytest.mark.parametrize("policy", ["reposition", "boundary"])
def test_a_blend_is_that_of_the_cpu(policy):
    module, asked = build("llama"), segments()
    with Engine(module, None, CONFIG) as engine:
        want = [blended(engine, asked, policy=policy) for _ in range(2)]
    with Engine(module.to("cuda"), None, CONFIG) as engine:
        got = [blended(engine, asked, policy=policy) for _ in range(2)]
    for ours, theirs in zip(got, want):
        assert ours.report.charged == theirs.report.charged
        torch.testing.assert_close(ours.logits.cpu(), theirs.logits, rtol=0, atol=oracle.TOLERANCE)
        for mine, other in zip(ours.layers, theirs.layers):
            torch.testing.assert_close(mine.k.cpu(), other.k, rtol=0, atol=oracle.TOLERANCE)


@pytest.mark.parametrize("name", ["headrace", "quest"])
def test_the_graph_takes_the_steps_that_are_taken_one_by_one(name, graphs, monkeypatch):
    module, asked = build("llama"), [prompt(n).tolist() for n in (40, 200, 300)]
    method = preset(name, budget=64, prefetch="layer")
    replayed = answers(module, asked, method, 100)
    assert len(graphs) == 1
    monkeypatch.setattr(DeviceBatch, "_capture", lambda self: None)
    eager = answers(module, asked, method, 100)
    assert [c.tokens for c in replayed] == [c.tokens for c in eager]


def test_without_memory_for_a_graph_steps_are_taken_one_by_one(graphs, monkeypatch):
    """Also where it ends while the next layer is fetched on the side stream."""
    module, asked = build("llama"), [prompt(300).tolist()]
    method, attend = preset("headrace", budget=64, prefetch="layer"), SelectedLayer.attend
    want = answers(module, asked, method, 20)

    def fails(self, *args):
        if torch.cuda.is_current_stream_capturing() and self._number == 1:
            raise torch.OutOfMemoryError("no memory")
        return attend(self, *args)

    monkeypatch.setattr(SelectedLayer, "attend", fails)
    got = answers(module, asked, method, 20)
    assert [graph is None for graph in graphs] == [False, True]
    assert [c.tokens for c in got] == [c.tokens for c in want]


def test_4000_tokens_do_not_drift():
    """At full budget, from a buffer that holds it all: dense attention, token by token."""
    module = build("llama", max_position_embeddings=8192)
    text = prompt(100)
    done = answers(module, [text.tolist()], full("headrace", budget=5000), 4000)[0]
    every = torch.tensor([*text.tolist(), *done.tokens[:-1]], device="cuda")
    best = oracle.logits(module, every)[len(text) - 1 :].topk(2)
    taken = torch.tensor(done.tokens, device="cuda")
    ties = (best.values[:, 0] - best.values[:, 1]) <= 10 * oracle.TOLERANCE
    assert ((best.indices[:, 0] == taken) | ties).all()


def test_two_threads_capture_and_replay_at_once():
    module, texts = build("llama").to("cuda"), [prompt(n).tolist() for n in (50, 200)]
    config = EngineConfig(method=full("headrace"), pinned_bytes=256 << 20)
    with Engine(module, None, config) as engine:
        want = [engine.generate(text, max_new_tokens=80)[0].tokens for text in texts]
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda text: engine.generate(text, max_new_tokens=80), texts)
            assert [done[0].tokens for done in both] == want


def test_what_a_batch_on_a_gpu_generated_is_in_the_store(tmp_path):
    module, method = build("llama").to("cuda"), full("headrace")
    config = settings(tmp_path / "store")
    config = structs.replace(config, method=method, pinned_bytes=256 << 20)
    text = prompt(100).tolist()
    with Engine(module, None, config) as engine:
        answer = engine.generate(text, max_new_tokens=60)[0].tokens
    turn = [*text, *answer, *prompt(9).tolist()]
    with Engine(module, None, config) as engine:
        again = engine.generate(turn, max_new_tokens=20)[0]
    assert again.stats.cached_tokens == 144
    theirs = oracle.generate(build("llama"), [torch.tensor(turn)], 20)[0]
    oracle.assert_same_answer(module, torch.tensor(turn), again.tokens, theirs)
