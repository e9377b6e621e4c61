"""The engine on prompts of segments: what it finds, what it refuses, what it reports."""

import threading
import time

import pytest
import torch

from engine import BlendConfig, ConfigError, Engine, EngineConfig, PromptError, Segments
from engine.blend import probe
from engine.blend.probe import attention_mass
from engine.decode import decode
from engine.method import preset
from engine.perfmodel import Decision
from engine.sampling import Sampling
from kvstore.block import Kind
from kvstore.config import StoreConfig
from tests.engine import oracle
from tests.engine.blend.requests import CONFIG, POLICIES, blended, full, segments
from tests.engine.families import build, prompt

CLOSE = dict(rtol=0, atol=1e-4)
LOADS = dict(controller=False)
WHOLE = BlendConfig(share=1.0, controller=False)


@pytest.fixture(scope="module")
def module():
    return build("llama")


@pytest.fixture
def engine(module):
    with Engine(module, config=CONFIG) as engine:
        yield engine


def on_disk(folder, **changes):
    store = StoreConfig(host_bytes=0, disk_path=str(folder), disk_bytes=1 << 28)
    return EngineConfig(**(dict(block_tokens=16, prefill_chunk=48, store=store) | changes))


def test_plain_prompts_and_segments_are_answered_in_one_batch(engine, module):
    asked, plain = segments(), prompt(40)
    done = engine.generate([plain.tolist(), asked], max_new_tokens=12, blend=WHOLE)
    wanted = oracle.generate(module, [plain, torch.tensor(asked.tokens)], 12)
    for text, one, want in zip((plain, torch.tensor(asked.tokens)), done, wanted):
        oracle.assert_same_answer(module, text, one.tokens, want)
    assert done[0].stats.blend is None
    assert done[1].stats.blend.charged == 1
    assert done[1].stats.cached_tokens == 0  # its chunks were computed for it
    events = list(engine.stream(asked, max_new_tokens=12, blend=WHOLE))
    assert [event.token for event in events] == done[1].tokens
    stats = events[-1].completion.stats
    assert stats.cached_tokens == stats.prompt_tokens - 22  # prefix and question


def test_chunks_are_computed_once_and_found_by_another_process(module, tmp_path):
    asked = segments()
    with Engine(module, config=on_disk(tmp_path)) as engine:
        seen = []
        again = [*asked.chunks, asked.chunks[0]]
        engine.precompute(again, asked.prefix, progress=lambda done, of: seen.append((done, of)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
        first = blended(engine, asked, policy="boundary")
        written = engine.stats().tiers["disk"].bytes_written
    with Engine(module, config=on_disk(tmp_path)) as engine:
        engine.precompute(asked.chunks, asked.prefix)
        got = blended(engine, asked.ordered([0, 1, 2, 3]), policy="boundary")
        assert (got.report.missed, got.report.corrupt, first.report.missed) == (0, 0, 0)
        torch.testing.assert_close(got.logits, first.logits)
        engine.store.flush()
        assert engine.stats().tiers["disk"].bytes_written == 0 < written


def test_a_missing_chunk_is_computed_stored_and_reused(engine):
    asked = segments()
    engine.precompute(asked.chunks[:2], asked.prefix)
    got = blended(engine, asked, policy="boundary")
    assert (got.report.chunks, got.report.missed) == (4, 2)
    again = blended(engine, asked, policy="boundary")
    assert again.report.missed == 0
    torch.testing.assert_close(again.logits, got.logits)


def test_what_was_computed_for_a_prompt_did_not_come_from_the_store(engine):
    asked, always = segments(), BlendConfig(controller=False)
    start = list(asked.tokens[:64])
    engine.generate([start], max_new_tokens=1)  # ends within the second chunk
    engine.precompute([asked.chunks[0], asked.chunks[3]], asked.prefix)
    cached = [
        engine.generate(asked, max_new_tokens=1, blend=always)[0].stats.cached_tokens
        for _ in range(2)
    ]
    missing = asked.spans[2].stop - len(start)
    assert cached == [cached[1] - missing, asked.spans[3].stop]


def test_a_store_without_room_for_the_chunks_changes_nothing_but_the_time(module, engine):
    asked = segments()
    want = blended(engine, asked, policy="deviation", share=0.8)
    small = StoreConfig(host_bytes=1 << 17)
    with Engine(module, config=EngineConfig(block_tokens=16, store=small)) as poor:
        for _ in range(2):
            got = blended(poor, asked, policy="deviation", share=0.8)
            torch.testing.assert_close(got.logits, want.logits, **CLOSE)
            assert got.report.missed > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_one_corrupt_chunk_among_ten_changes_nothing_but_the_time(module, tmp_path, policy):
    chunks = [prompt(45, seed=i).tolist() for i in range(10)]
    asked = Segments(prompt(9).tolist(), chunks, prompt(13, seed=51).tolist())
    with Engine(module, config=on_disk(tmp_path)) as engine:
        want = blended(engine, asked, policy=policy, share=0.75)
        tokens = engine.generate(asked, max_new_tokens=8, blend=BlendConfig(**LOADS))[0].tokens
        engine.store.flush()
        block = engine.store.get(engine.blending.chunks.keys(asked.prefix, asked.chunks[6])[1])
        raw = block.data.contiguous().view(torch.uint8).numpy().tobytes()
    damage(next(tmp_path.rglob("values-*")), raw[:512])
    with Engine(module, config=on_disk(tmp_path)) as engine:
        got = blended(engine, asked, policy=policy, share=0.75)
        assert (got.report.missed, got.report.corrupt) == (0, 1)
        assert torch.equal(got.logits, want.logits)
        again = engine.generate(asked, max_new_tokens=8, blend=BlendConfig(**LOADS))[0]
        assert again.tokens == tokens
        assert again.stats.blend.corrupt == 0


def damage(path, part):
    """Flip a byte wherever `part` lies in a file."""
    raw = bytearray(path.read_bytes())
    at = raw.find(part)
    assert at >= 0
    while at >= 0:
        raw[at + 100] ^= 1
        at = raw.find(part, at + 1)
    path.write_bytes(raw)


def test_blocks_that_cannot_be_read_at_all_are_computed(engine, monkeypatch):
    asked = segments()
    engine.precompute(asked.chunks, asked.prefix)
    monkeypatch.setattr(engine.store, "read_many", lambda keys, *_: [False] * len(keys))
    got = blended(engine, asked, policy="boundary")
    assert got.report.corrupt == 4
    monkeypatch.undo()
    torch.testing.assert_close(got.logits, blended(engine, asked, policy="boundary").logits)


def test_a_lost_start_of_the_prompt_is_computed(engine, monkeypatch):
    asked = segments()
    engine.generate(list(asked.tokens[: asked.spans[1].stop]), max_new_tokens=1)
    read_many = engine.store.read_many

    def lossy(keys, layers, out):
        found = read_many(keys, layers, out)
        return [is_ and key.kind is not Kind.EXACT for is_, key in zip(found, keys)]

    monkeypatch.setattr(engine.store, "read_many", lossy)
    got = blended(engine, asked, share=1.0)
    torch.testing.assert_close(got.logits, full(engine, asked).logits, **CLOSE)
    assert got.report.exact_tokens == len(asked.chunks[0])


def test_chunks_of_another_tenant_model_prefix_or_block_size_are_never_used(module, tmp_path):
    asked = segments()
    with Engine(module, config=on_disk(tmp_path, tenant="alice")) as engine:
        engine.precompute(asked.chunks, asked.prefix)
        assert blended(engine, asked).report.missed == 0
        other = Segments(asked.prefix[:-1], asked.chunks, asked.question)
        assert blended(engine, other).report.missed == 4
    for config in (on_disk(tmp_path, tenant="bob"), on_disk(tmp_path, block_tokens=32)):
        with Engine(module, config=config) as engine:
            assert blended(engine, asked).report.missed == 4
    with Engine(build("llama-bias"), config=on_disk(tmp_path, tenant="alice")) as engine:
        assert blended(engine, asked).report.missed == 4


def test_a_chunk_is_no_prefix_and_a_prefix_no_chunk(engine):
    """Its KV would be right, but only behind nothing: kinds never answer for each other."""
    asked = segments()
    engine.precompute(asked.chunks, ())
    done = engine.generate(list(asked.chunks[3]), max_new_tokens=1)[0]
    assert done.stats.cached_tokens == 0
    assert blended(engine, Segments((), [prompt(40).tolist()], [5])).report.missed == 1


def test_long_instructions_are_stored_with_the_first_chunk_behind_them(module, engine):
    made = segments()
    asked = Segments(prompt(40, seed=8).tolist(), made.chunks, made.question)
    engine.precompute(asked.chunks, asked.prefix)
    got = blended(engine, asked, policy="reposition")
    assert got.report.exact_tokens == 32 + len(asked.chunks[0])  # two blocks, and in its place
    (plain,) = engine.generate([*asked.prefix, 5, 6, 7], max_new_tokens=6)
    assert plain.stats.cached_tokens == 32
    with Engine(module, config=CONFIG) as other:
        (want,) = other.generate([*asked.prefix, 5, 6, 7], max_new_tokens=6)
        exact = full(other, asked)
    assert plain.tokens == want.tokens
    for (k, v), (wk, wv) in zip(got.layers, exact.layers, strict=True):
        torch.testing.assert_close(k[:, :40], wk[:, :40], **CLOSE)
        torch.testing.assert_close(v[:, :40], wv[:, :40], **CLOSE)


def test_what_was_blended_is_never_stored_as_exact(engine):
    asked = segments()
    done = engine.generate(asked, max_new_tokens=40, blend=BlendConfig(**LOADS))[0]
    plain = engine.generate([*asked.tokens, *done.tokens], max_new_tokens=1)[0]
    assert plain.stats.cached_tokens == 0
    want = oracle.logits(engine.model.module, [*asked.tokens, *done.tokens])[-1]
    assert int(want.argmax()) == plain.tokens[0]


def test_an_exact_prefix_is_a_blend_with_nothing_to_repair(engine):
    asked = segments()
    engine.generate(list(asked.tokens), max_new_tokens=1)
    got = blended(engine, asked, policy="union", share=0.0)
    torch.testing.assert_close(got.logits, full(engine, asked).logits, **CLOSE)
    assert got.report.exact_tokens >= len(asked.context) // 16 * 16
    assert got.report.charged == 0


def test_an_exact_start_that_ends_within_a_chunk_is_taken_before_the_chunk(engine):
    asked = segments()
    cut = (asked.spans[1].start + 20) // 16 * 16
    engine.generate(list(asked.tokens[: cut + 1]), max_new_tokens=1)
    got, want = blended(engine, asked, policy="reposition"), full(engine, asked)
    for (k, v), (wk, wv) in zip(got.layers, want.layers):
        torch.testing.assert_close(k[:, :cut], wk[:, :cut], **CLOSE)
        torch.testing.assert_close(v[:, :cut], wv[:, :cut], **CLOSE)
    assert got.report.exact_tokens == cut
    assert got.report.reused_tokens == len(asked.context) - cut


def test_chunks_are_reordered_only_where_asked_and_more_is_then_exact(engine):
    asked = segments()
    before = asked.ordered([2, 0, 3, 1])
    engine.generate(list(before.tokens), max_new_tokens=1)
    kept = blended(engine, asked, policy="reposition")
    assert kept.report.order == (0, 1, 2, 3)
    got = blended(engine, asked, policy="reposition", reorder=True)
    assert got.report.order == (2, 0, 3, 1)
    assert got.report.exact_tokens >= len(asked.context) // 16 * 16
    torch.testing.assert_close(got.logits, full(engine, before).logits, **CLOSE)


def test_reordering_without_anything_stored_keeps_the_order(engine):
    got = blended(engine, segments(), reorder=True)
    assert got.report.order == (0, 1, 2, 3)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_repaired_kv_answers_the_same_request_again_and_no_other(engine, policy):
    asked = segments()
    kept = dict(policy=policy, share=0.75, keep_repaired=True)
    config = BlendConfig(**LOADS, **kept)
    first = engine.generate(asked, max_new_tokens=20, blend=config)[0]
    again = engine.generate(asked, max_new_tokens=20, blend=config)[0]
    assert first.tokens == again.tokens
    assert first.stats.blend.repaired_tokens == 0
    assert again.stats.blend.repaired_tokens == (len(asked.tokens) - 1) // 16 * 16
    other = Segments(asked.prefix, asked.chunks, [*asked.question[:-1], 5])
    reused = blended(engine, other, **kept).report.repaired_tokens
    assert (reused > 0) == (policy in ("boundary", "deviation"))  # which do not read the question
    for change in (dict(share=0.7), dict(keep_repaired=False), dict(policy="reposition")):
        assert blended(engine, asked, **(kept | change)).report.repaired_tokens == 0
    joined = [[*asked.chunks[0], *asked.chunks[1]], *asked.chunks[2:]]
    moved = Segments(asked.prefix, joined, asked.question)
    assert moved.tokens == asked.tokens
    assert blended(engine, moved, **kept).report.repaired_tokens == 0
    plain = engine.generate(list(asked.tokens), max_new_tokens=1)[0]
    assert plain.stats.cached_tokens == 0


def test_an_answer_behind_repaired_kv_is_stored_under_the_names_of_its_own_tokens(
    engine, monkeypatch
):
    asked, put = segments(), {}
    monkeypatch.setattr(engine.store, "put", lambda blocks: put.update(blocks))
    config = BlendConfig(policy="boundary", keep_repaired=True, **LOADS)
    done = engine.generate(asked, max_new_tokens=40, blend=config)[0]
    kept = {key: block for key, block in put.items() if key.kind is Kind.REPAIRED}
    assert [key.num_tokens for key in kept] == [block.data.shape[3] for block in kept.values()]
    tokens = [*asked.tokens, *done.tokens[:-1]]
    (warmup,) = {key.digest for key in kept if not key.depth}
    chain = engine.plain.keys(tokens, name_of(engine, asked, config))
    assert chain[0].digest == warmup
    assert list(kept) == chain


def name_of(engine, asked, config):
    """What names the blocks of a blend."""
    run = engine.accept(asked, 1, Sampling(), (), config)
    engine.blending._repaired(run)
    return run.repair


def test_what_was_repaired_is_what_comes_back(engine):
    asked, kept = segments(), dict(policy="boundary", share=0.5, keep_repaired=True)
    first = engine.generate(asked, max_new_tokens=1, blend=BlendConfig(**LOADS, **kept))
    assert first[0].stats.blend.repaired_tokens == 0
    want, got = blended(engine, asked, policy="boundary", share=0.5), blended(engine, asked, **kept)
    assert got.report.repaired_tokens > 0
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    for (k, v), (wk, wv) in zip(got.layers, want.layers):
        torch.testing.assert_close(k, wk, **CLOSE)
        torch.testing.assert_close(v, wv, **CLOSE)


def sparse(module, **method):
    return Engine(module, config=replace_config(method=preset("headrace", **method)))


def replace_config(**changes):
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__struct_fields__}
    return EngineConfig(**(fields | changes))


def test_relocated_chunks_at_ratio_one_and_full_budget_give_dense_tokens(module):
    chunks = [prompt(50 + i, seed=i).tolist() for i in range(10)]
    asked = Segments(prompt(9).tolist(), chunks, prompt(13, seed=51).tolist())
    asked = asked.ordered([9, 2, 5, 0, 7, 1, 8, 3, 6, 4])
    want = oracle.generate(module, [torch.tensor(asked.tokens)], 16)[0]
    with sparse(module, budget=len(asked.tokens) + 32) as engine:
        engine.precompute(chunks, asked.prefix)
        done = engine.generate(asked, max_new_tokens=16, blend=WHOLE)[0]
    oracle.assert_same_answer(module, torch.tensor(asked.tokens), done.tokens, want)
    assert done.stats.sparse.selected > 0
    assert done.stats.blend.missed == 0


def test_the_divergence_of_a_fifth_repaired_and_a_fiftieth_attended_is_reported(
    module, record_property
):
    chunks = [prompt(50 + i, seed=i).tolist() for i in range(10)]
    asked = Segments(prompt(9).tolist(), chunks, prompt(13, seed=51).tolist())
    asked = asked.ordered([9, 2, 5, 0, 7, 1, 8, 3, 6, 4])
    want = oracle.logits(module, [*asked.tokens, 5])[-1].log_softmax(-1)
    settings = BlendConfig(share=0.2, controller=False)
    with sparse(module, budget=0.02) as engine:
        run = engine.accept(asked, 4, Sampling(), (), settings)
        engine.blending.prefill(run)
        got = decode(engine.model, [run.cache], torch.tensor([5]))[0].log_softmax(-1)
        run.release()
    kl = float((want.exp() * (want - got)).sum())
    record_property("kl", kl)
    print(f"KL of the second token, 20 % repaired and 2 % attended to: {kl:.3f}")
    assert 0 < kl < 1
    assert run.stats.blend.charged <= 0.2


def test_two_threads_with_the_same_chunks_compute_each_once(engine, monkeypatch):
    asked, counted = segments(), []
    put = engine.store.put

    def counting(blocks):
        counted.extend(key for key, _ in blocks)
        put(blocks)

    monkeypatch.setattr(engine.store, "put", counting)
    got = {}

    def work(i):
        order = [[0, 1, 2, 3], [3, 1, 0, 2]][i]
        if i == 0:
            engine.precompute(asked.chunks, asked.prefix)
        got[i] = engine.generate(asked.ordered(order), max_new_tokens=6, blend=WHOLE)[0].tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == len(set(counted))
    for i, order in enumerate(([0, 1, 2, 3], [3, 1, 0, 2])):
        text = torch.tensor(asked.ordered(order).tokens)
        want = oracle.generate(engine.model.module, [text], 6)[0]
        oracle.assert_same_answer(engine.model.module, text, got[i], want)


def test_the_controller_decides_and_says_why(engine, monkeypatch):
    asked = segments()
    works = []

    def decide(work, load):
        works.append(work)
        return Decision(load, 0.6 if load else 1.0, "because")

    monkeypatch.setattr(engine.blending.speeds, "decide", lambda work: decide(work, False))
    got = blended(engine, asked, controller=True)
    assert (got.report.loaded, got.report.reason, got.report.charged) == (False, "because", 1.0)
    torch.testing.assert_close(got.logits, full(engine, asked).logits, **CLOSE)
    monkeypatch.setattr(engine.blending.speeds, "decide", lambda work: decide(work, True))
    engine.store.clear()
    engine.precompute(asked.chunks, asked.prefix)
    got = blended(engine, asked, controller=True, share=0.2)
    assert got.report.loaded
    assert 0.5 < got.report.charged <= got.report.share == 0.6
    work = works[-1]
    assert work.reusable == got.report.reused_tokens
    assert work.fresh == got.report.fresh_tokens
    blocks = sum(map(len, asked.chunks))
    assert work.loads == {"host": blocks * engine.model.shape.kv_bytes_per_token}


def test_waiting_for_a_stored_start_is_no_computing(engine, monkeypatch):
    """Or the controller would take a slow disk for a slow processor, and load all the more."""
    made, learned = segments(), []
    asked = Segments((), made.chunks[:1], made.question)
    engine.generate(list(asked.tokens), max_new_tokens=1)  # the start is stored
    read = engine.store.read_many

    def slow(*args):
        time.sleep(0.3)
        return read(*args)

    monkeypatch.setattr(engine.store, "read_many", slow)
    speeds = engine.blending.speeds
    monkeypatch.setattr(speeds, "prefilled", lambda tokens, seconds, **_: learned.append(seconds))
    began = time.perf_counter()
    report = engine.generate(asked, max_new_tokens=1)[0].stats.blend
    took = time.perf_counter() - began
    assert report.reason.startswith("compute")
    assert report.exact_tokens > 0
    assert report.load_s >= 0.3
    assert report.waited_s >= 0.1
    assert learned[-1] == report.compute_s  # before it, the chunk alone
    assert report.compute_s <= took - report.waited_s


def test_after_some_requests_the_controller_knows_its_speeds(engine):
    asked = segments()
    for _ in range(3):
        report = engine.generate(asked, max_new_tokens=1)[0].stats.blend
    assert "not measured" not in report.reason
    assert "host" in report.reason


def test_a_request_that_is_given_up_frees_its_pins(engine):
    stream = engine.stream(segments(), max_new_tokens=500, blend=WHOLE)
    next(stream)
    stream.close()
    assert not engine.store._pins


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (((1,), [[2]], ()), "question is empty"),
        (((1,), [[2], []], (3,)), "chunk 1 is empty"),
    ],
)
def test_segments_refuse_what_is_no_prompt(parts, said):
    with pytest.raises(PromptError, match=said):
        Segments(*parts)


def test_prompts_of_segments_that_do_not_fit_are_refused(engine):
    long = prompt(1100).tolist()
    with pytest.raises(PromptError, match="1024 positions"):
        engine.generate(Segments((), [], long))
    with pytest.raises(PromptError, match="split the chunk"):
        engine.precompute([long[:1020]], [1] * 10)
    with pytest.raises(PromptError, match="out of range"):
        engine.precompute([[5, 999]])
    with pytest.raises(PromptError, match="out of range"):
        engine.generate(Segments((), [[5, 999]], [4]))
    with pytest.raises(PromptError, match="empty"):
        engine.precompute([[]])
    assert engine.stats().tiers["host"].blocks == 0


def test_segments_without_chunks_are_a_plain_prompt(engine):
    asked = Segments([1, 2, 3], [], [4, 5])
    got = blended(engine, asked)
    torch.testing.assert_close(got.logits, full(engine, asked).logits, **CLOSE)
    assert not got.report.loaded


def test_settings_come_from_a_toml_file(tmp_path):
    path = tmp_path / "engine.toml"
    path.write_text('[blend]\npolicy = "boundary"\nshare = 0.5\n')
    assert EngineConfig.from_toml(path).blend == BlendConfig(policy="boundary", share=0.5)
    path.write_text('[blend]\npolicy = "magic"\n')
    with pytest.raises(ConfigError, match=r"blend\.policy"):
        EngineConfig.from_toml(path)
    path.write_text("[blend]\nshare = 2.0\n")
    with pytest.raises(ConfigError, match=r"blend\.share"):
        EngineConfig.from_toml(path)


def test_segments_are_equal_if_their_parts_are():
    asked = segments()
    assert asked.ordered([0, 1, 2, 3]) == asked
    assert asked.ordered([1, 0, 2, 3]) != asked


@pytest.mark.parametrize("asked", [3, 16, 80])
def test_relevance_is_what_the_end_of_the_question_attends_to(engine, monkeypatch, asked):
    """Not what separators and the prefix do, whose rows are not the prompt's last ones."""
    made = segments()
    made = Segments(made.prefix, made.chunks, (prompt(asked) % 50).tolist(), made.separator)
    engine.precompute(made.chunks, made.prefix)
    rows = []

    def noted(q, k, spec):
        rows.append(q.shape[1])
        return attention_mass(q, k, spec)

    monkeypatch.setattr(probe, "attention_mass", noted)
    blended(engine, made, policy="query", share=0.9)
    behind = asked + len(made.separator)
    assert rows
    assert set(rows) <= {min(probe.ASKING, asked), min(probe.ASKING, behind)}
