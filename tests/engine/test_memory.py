"""Who gets a cache: what a request may take of the device and of the pool."""

from dataclasses import replace

import msgspec
import pytest
import torch

from engine import Engine, EngineConfig, EngineError, PromptError, Segments
from engine.batch.batch import DeviceBatch
from engine.decoding import fitting
from engine.memory import in_a_batch
from engine.method import preset
from engine.model.hf import HFModel
from engine.sampling import Sampling
from engine.sparse.beside import beside
from engine.sparse.cache import pool_shape
from kvstore.config import StoreConfig
from kvstore.pool import pinned
from kvstore.pool.device import DeviceTier
from tests.engine.families import build, prompt

STORE = StoreConfig(host_bytes=1 << 26)
LAYER = 2 * 2 * 64 * 4  # bytes of a token's K and V in a layer
BLOCK = 2048  # its layers are stored one by one
HIDDEN = 96 * 4  # of its hidden state
TOKENS, NEW = 100, 9
KEPT = TOKENS + NEW - 1  # the last one's KV is never asked for


def engine(module, cache_bytes, **method):
    config = EngineConfig(cache_bytes=cache_bytes, block_tokens=BLOCK, store=STORE)
    sparse = preset("headrace", budget=40, **method)
    return Engine(
        module, None, msgspec.structs.replace(config, method=sparse, pinned_bytes=8 << 20)
    )


def own(module, tokens=KEPT):
    """Bytes that a sparse layer of a request has beside its KV."""
    each = beside(HFModel(module).shape, preset("headrace", budget=40), tokens)
    return tokens * each.token + each.fixed


def running(engine, *asked):
    return [engine.accept(p, NEW, Sampling(), ()) for p in asked]


@pytest.mark.parametrize("dense_layers", [0, 1, 7])
def test_a_sparse_request_takes_hidden_states_two_layers_and_those_that_stay_dense(dense_layers):
    module, asked = build("llama", num_hidden_layers=8), prompt(TOKENS).tolist()
    passing = TOKENS * HIDDEN + KEPT * LAYER * min(2, 8 - dense_layers)
    needed = passing + KEPT * LAYER * dense_layers + own(module) * (8 - dense_layers)
    with engine(module, needed, dense_layers=dense_layers) as fits:
        assert len(fits.generate(asked, max_new_tokens=NEW)[0].tokens) == NEW
    with (
        engine(module, needed - 1, dense_layers=dense_layers) as short,
        pytest.raises(
            PromptError, match=f"needs {needed} bytes of KV, indexes and hidden.*cache_bytes"
        ),
    ):
        short.generate(asked, max_new_tokens=NEW)


def test_a_model_with_no_layer_to_select_in_takes_its_kv_alone():
    module, asked = build("mistral-window"), prompt(TOKENS).tolist()
    with engine(module, KEPT * LAYER * 3) as fits:
        assert len(list(fits.memory.groups(running(fits, asked)))) == 1
    with engine(module, KEPT * LAYER * 3 - 1) as short, pytest.raises(PromptError, match="of KV,"):
        list(short.memory.groups(running(short, asked)))


def test_dense_layers_of_all_requests_stay_and_one_prompt_at_a_time_is_read():
    module, asked = build("gemma3"), prompt(TOKENS).tolist()  # two layers of four have windows
    passing = TOKENS * HIDDEN + KEPT * LAYER * 2
    for together in (1, 2, 3):
        with engine(module, passing + together * 2 * (KEPT * LAYER + own(module))) as one:
            groups = list(one.memory.groups(running(one, *[asked] * 3)))
            assert len(groups[0]) == together
            assert sum(map(len, groups)) == 3


def test_a_prompt_of_segments_has_all_layers_on_the_device_while_it_is_blended():
    chunks = [prompt(30, seed=i).tolist() for i in range(2)]
    asked = Segments(prompt(9).tolist(), chunks, prompt(13).tolist())
    module, kept = build("llama"), len(asked.tokens) + NEW - 1
    needed = (kept * LAYER + own(module, kept)) * 3
    with engine(module, needed) as fits:
        assert len(fits.generate(asked, max_new_tokens=NEW)[0].tokens) == NEW
    with engine(module, needed - 1) as short, pytest.raises(PromptError, match="cache_b"):
        short.generate(asked, max_new_tokens=NEW)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("headrace", {}),
        ("headrace", {"budget": 0.1}),
        ("headrace", {"attend_on": "device", "keys": "int8", "values": "int4"}),
        ("oracle", {"attend_on": "device"}),
        ("quest", {}),
        ("shadowkv", {}),
        ("a2ats", {"options": {"centroids": 16}}),
        ("pqcache", {"options": {"bits": 4, "subspaces": 8}}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "llama-mha-llama3", "llama-mqa-128"])
def test_what_indexes_and_buffers_take_is_counted(family, name, changes):
    """And not much more than that."""
    if name in ("a2ats", "pqcache"):
        pytest.importorskip("faiss", reason="codebooks are trained by FAISS")
    method = preset(name, **({"budget": 64} | changes))
    config = EngineConfig(block_tokens=BLOCK, store=STORE, method=method, pinned_bytes=8 << 20)
    with Engine(build(family), None, config) as engine:
        (run,) = running(engine, prompt(900).tolist())
        engine.plain.prefill(run)
        layers = engine.memory.pool.shape.num_layers
        each = beside(engine.model.shape, method, 900)
        counted = layers * (run.capacity * each.token + each.fixed)
        assert run.cache.device_bytes <= counted <= 1.4 * run.cache.device_bytes
        need = engine.memory.need(run)
        assert (need.answer, need.fixed) == (layers * each.token, layers * each.fixed)
        run.release()


@pytest.mark.parametrize("tokens", [2, 130, 960])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("headrace", {}),
        ("headrace", {"attend_on": "device", "hot": 1.0}),
        ("headrace", {"options": {"bits": 4}}),
        ("shadowkv", {"rank": 4}),
    ],
)
def test_what_grows_with_an_answer_is_counted(tokens, name, changes):
    method = preset(name, **({"budget": 64} | changes))
    config = EngineConfig(block_tokens=BLOCK, store=STORE, method=method, pinned_bytes=8 << 20)
    with Engine(build("llama"), None, config) as engine:
        run = engine.accept(prompt(tokens).tolist(), 60, Sampling(), ())
        each, layers = (
            beside(engine.model.shape, method, tokens),
            engine.memory.pool.shape.num_layers,
        )
        for _ in engine._steps([run]):
            if run.cache is not None:
                counted = run.capacity * each.token + each.fixed
                assert run.cache.device_bytes <= layers * counted


def test_a_batch_has_room_for_its_indexes_from_the_start(monkeypatch):
    """They count once: a GPU's requests would have to wait for room that they do not take."""
    with engine(build("llama"), 1 << 20) as made:
        (run,) = running(made, prompt(TOKENS).tolist())
        assert made.memory.need(run).fixed > 0
        monkeypatch.setattr(made.memory, "batched", True)
        assert (made.memory.need(run).answer, made.memory.need(run).fixed) == (0, 0)


@pytest.mark.parametrize("name", ["headrace", "oracle", "quest", "shadowkv", "a2ats", "pqcache"])
def test_slots_of_a_batch_take_what_is_counted_for_their_requests(name):
    model, method = HFModel(build("llama")), preset(name, budget=64, attend_on="device")
    pool = DeviceTier(pool_shape(model, method), 8 << 20)
    batch = DeviceBatch(model, method, pool, slots=4, capacity=400)
    each = beside(model.shape, method, 400)
    for layer in batch._layers:  # norms of centroids, which are few, are not counted
        assert layer.nbytes <= 1.1 * 4 * (400 * each.token + each.fixed)


def test_a_complete_prompt_has_its_own_indexes_until_it_takes_its_place_in_a_batch():
    with engine(build("llama"), 1 << 22, attend_on="device") as made:
        made.memory.batched = True
        (run,) = running(made, prompt(TOKENS).tolist())
        made.plain.prefill(run)
        counted = made.memory.need(run).most(run.capacity)
        assert run.capacity * LAYER * 3 < run.cache.device_bytes <= counted
        run.release()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("budget", [40, 0.3])
def test_the_longest_request_that_a_service_names_has_room_with_all_that_it_needs(budget, batched):
    method = preset("headrace", budget=budget, attend_on="device")
    config = EngineConfig(cache_bytes=1 << 20, method=method, store=STORE, pinned_bytes=8 << 20)
    with Engine(build("llama"), None, config) as made:
        made.memory.batched = batched
        longest = made.memory.longest
        runs = running(made, *(prompt(longest - NEW + 1 + more).tolist() for more in (0, NEW)))
        fits, does_not = (made.memory.need(run).most(run.capacity) for run in runs)
        assert runs[0].capacity == longest
        assert fits <= 1 << 20 < does_not


@pytest.mark.parametrize(
    ("changes", "batched"),
    [({}, True), (dict(top_p=0.9), False), (dict(certify=0.1), False), (dict(budget=0.1), False)],
)
def test_on_a_gpu_methods_of_static_shapes_are_decoded_in_a_batch_and_others_are_not(
    changes, batched
):
    model = HFModel(build("llama"))
    method = preset("headrace", **(dict(budget=40) | changes))
    pool = DeviceTier(pool_shape(model, method), 1 << 20)
    assert not in_a_batch(model, method, pool)
    model.shape = replace(model.shape, device=torch.device("cuda"))
    assert in_a_batch(model, method, pool) == batched
    assert not in_a_batch(model, method, None)


def test_what_a_request_has_beside_its_kv_counts_in_a_call_but_not_in_a_service_with_a_batch():
    module, asked = build("llama", num_hidden_layers=8), prompt(TOKENS).tolist()
    passing = TOKENS * HIDDEN + KEPT * LAYER * 2
    with engine(module, passing + 2 * 8 * own(module)) as two:
        runs = running(two, *[asked] * 3)
        alone = two.memory.need(runs[0])
        assert [len(group) for group in two.memory.groups(runs)] == [2, 1]
        two.memory.batched = True  # then one has its own, too, until it has its slot
        assert [len(group) for group in two.memory.groups(runs)] == [1, 1, 1]
        assert two.memory.need(runs[0]).fixed == 0 < alone.fixed


def test_a_service_has_as_many_places_as_the_device_has_room_for(caplog):
    assert fitting(64, 100, 6400, 4096) == 64
    assert not caplog.records
    assert fitting(64, 100, 6399, 4096) == 63
    assert "room for 63 requests of 4096 tokens" in caplog.text
    with pytest.raises(
        EngineError, match=r"up to 4096 tokens takes 100 bytes.*schedule\.max_tokens"
    ):
        fitting(64, 100, 99, 4096)
    with pytest.raises(EngineError, match="which has 0 beside"):
        fitting(64, 100, -5, 4096)


def test_no_pages_are_locked_for_a_model_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinned, "lock_pages", lambda *_: pytest.fail("pages were locked"))
    with engine(build("llama"), 1 << 24) as one:
        assert one.memory.pool is not None


def test_a_batch_has_slots_for_the_longest_of_its_requests():
    module = build("llama", num_hidden_layers=8)
    long, short = prompt(TOKENS).tolist(), prompt(20).tolist()
    passing = TOKENS * HIDDEN + KEPT * LAYER * 2
    with engine(module, passing + 8 * (2 * own(module) + 2 * own(module, 20 + NEW - 1))) as two:
        runs = running(two, long, short, short)
        assert [len(group) for group in two.memory.groups(runs)] == [3]
        two.memory.batched = True
        assert [len(group) for group in two.memory.groups(runs)] == [2, 1]


def test_folders_may_be_paths(tmp_path):
    config = EngineConfig(spill_path=tmp_path / "s", store=StoreConfig(disk_path=tmp_path / "kv"))
    assert config.store.disk_path == tmp_path / "kv"
