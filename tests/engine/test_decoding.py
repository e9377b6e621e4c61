"""An engine that decodes in a batch answers as one that decodes request by request."""

import pytest

from engine import Engine, EngineConfig
from engine.batch.batch import DeviceBatch
from engine.decoding import Loop, Seated, decoding
from engine.method import preset
from engine.sampling import Sampling
from kvstore.config import StoreConfig
from tests.engine.families import build, prompt

LENGTHS = (5, 150, 64, 300)


def engine_with(method, batched, path=None, eos=None, **changes):
    """An engine with that method, which decodes in a batch if asked to."""
    store = StoreConfig(disk_path=None if path is None else str(path))
    config = EngineConfig(method=method, pinned_bytes=64 << 20, store=store, **changes)
    module = build("llama")
    module.generation_config.eos_token_id = eos
    engine = Engine(module, None, config)
    engine.memory.batched = batched
    return engine


def full(name, **changes):
    """A budget at which all is attended to: there rounding changes no choice."""
    given = dict(budget=600, attend_on="device", hot=1.0)
    if name == "shadowkv":
        given |= dict(rank=10_000, options={"outlier_chunks": 0})
    return preset(name, **(given | changes))


@pytest.mark.parametrize("name", ["headrace", "shadowkv", "a2ats"])
def test_a_batch_gives_the_tokens_of_the_loop_to_requests_that_end_at_different_times(name):
    prompts, eos = [prompt(n).tolist() for n in LENGTHS], [133, 182, 198]  # these answers have them
    with engine_with(full(name), batched=False, eos=eos) as engine:
        want = engine.generate(prompts, max_new_tokens=30)
        assert engine.memory.pool.used_bytes == 0
    with engine_with(full(name), batched=True, eos=eos) as engine:
        done = engine.generate(prompts, max_new_tokens=30)
        assert engine.memory.pool.used_bytes == 0
    assert [c.tokens for c in done] == [c.tokens for c in want]
    assert len({len(c.tokens) for c in done}) > 1
    for ours, theirs in zip(done, want):
        assert ours.stats.sparse.selected == theirs.stats.sparse.selected


def test_what_a_batch_generated_is_in_the_store_for_the_next_turn(tmp_path):
    first, method = prompt(150).tolist(), full("headrace")
    with engine_with(method, True, tmp_path / "store", block_tokens=16) as engine:
        answer = engine.generate(first, max_new_tokens=24)[0].tokens
    assert len(answer) > 16
    turn = [*first, *answer, *prompt(20).tolist()]
    with engine_with(method, True, tmp_path / "store", block_tokens=16) as engine:
        again = engine.generate(turn, max_new_tokens=12)[0]
    with engine_with(method, False) as engine:
        want = engine.generate(turn, max_new_tokens=12)[0]
    assert again.stats.cached_tokens == (len(first) + len(answer) - 1) // 16 * 16
    assert again.tokens == want.tokens


@pytest.mark.parametrize(
    ("batched", "changes", "exact"),
    [
        (False, dict(budget=64), 150),
        (False, dict(budget=155, dense_layers=1), 155),
        (False, dict(budget=0.5), 150),
        (False, dict(budget=10_000, values="int8"), 150),
        (False, dict(budget=10_000, top_p=0.9), 150),
        (True, dict(budget=64), 150),
        (True, dict(budget=155), 155),
    ],
)
def test_what_a_step_made_that_left_tokens_out_is_not_in_the_store(
    tmp_path, batched, changes, exact
):
    method, first = preset("headrace", hot=2.0, attend_on="device", **changes), prompt(150).tolist()
    with engine_with(method, batched, tmp_path / "store", block_tokens=8) as engine:
        answer = engine.generate(first, max_new_tokens=20)[0].tokens
        keys = engine.plain.keys([*first, *answer])
        assert len(keys) == 21
        assert engine.store.lookup(keys) == exact // 8


def test_a_stream_that_is_closed_leaves_its_slot_and_its_blocks():
    with engine_with(full("headrace"), batched=True) as engine:
        stream = engine.stream(prompt(150).tolist(), max_new_tokens=60)
        for _ in range(5):
            next(stream)
        assert engine.memory.pool.used_bytes > 0
        stream.close()
        assert engine.memory.pool.used_bytes == 0


@pytest.mark.parametrize(("batched", "kind"), [(True, Seated), (False, Loop)])
def test_a_batch_decodes_where_there_is_one(batched, kind):
    with engine_with(full("headrace"), batched) as engine:
        run = engine.accept(prompt(20).tolist(), 5, Sampling(), ())
        assert type(decoding(engine.model, engine.memory, [run])) is kind


def test_a_device_without_room_says_what_to_do(monkeypatch):
    import torch

    from engine.errors import EngineError

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceBatch, "_make_tensors", no_room)
    with (
        engine_with(full("headrace"), batched=True) as engine,
        pytest.raises(EngineError, match=r"no room for 1 requests .*ask for fewer or shorter"),
    ):
        engine.generate(prompt(20).tolist(), max_new_tokens=5)
