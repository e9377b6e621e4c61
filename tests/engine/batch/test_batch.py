"""A batch in static shapes decodes what each request decodes alone."""

import pytest
import torch

from engine.batch.batch import DeviceBatch, why_not
from engine.batch.layer import SelectedLayer
from engine.cache import Query
from engine.errors import EngineError
from engine.method import preset
from engine.model.hf import HFModel
from engine.prefill import prefill
from engine.sparse.cache import SparseCache, pool_shape, sparse_layers
from kvstore.pool.device import DeviceTier
from tests.engine.families import build, prompt
from tests.engine.sparse.test_layer import GLOBAL, dense_of, full

ROOM = 80
SEED = torch.Generator().manual_seed(5)
NAMES = ["headrace", "shadowkv", "a2ats", "quest", "pqcache", "oracle"]


class Batch:
    """A model, a pool, requests that were read, and a batch for them; closed at the end."""

    def __init__(self, module, method, *, slots=4, capacity=400, room=ROOM, **options):
        self.model, self.method, self.room = HFModel(module), method, room
        self.pool = DeviceTier(pool_shape(self.model, method), 64 << 20)
        self.batch = DeviceBatch(
            self.model, method, self.pool, slots=slots, capacity=capacity, **options
        )
        self.caches, self.twins, self.followed = {}, {}, 0

    def join(self, tokens):
        """A request is read and joins; its slot and its first logits."""
        cache, first = self._read(tokens)
        try:
            slot = self.batch.adopt(cache, self.room)
        except EngineError:
            cache.close()
            raise
        self.caches[slot], (self.twins[slot], _) = cache, self._read(tokens)
        return slot, first

    def _read(self, tokens):
        cache = SparseCache(self.model, len(tokens) + self.room, self.method, self.pool)
        first = prefill(self.model, cache, tokens, chunk=97)
        cache.finalize()
        return cache, first

    def leave(self, slot):
        """What the request did, by the batch and by its twin."""
        found = []
        for caches in (self.caches, self.twins):
            cache = caches.pop(slot)
            found.append(cache.stats)
            cache.close()
        return found

    def follow(self, layer, fresh, clock, ids, heads):
        """Every request's twin takes the same step alone: the same ids, and the same attention."""
        for slot, twin in self.twins.items():
            if int(clock.positions[slot]) < 0:
                continue
            alone = twin.layer(sparse_layers(self.model, self.method)[layer])
            alone.append(fresh.rotated_k[slot][:, None], fresh.v[slot][:, None])
            query = Query(fresh.rotated_q[slot], fresh.q[slot])
            want = alone.select(query)
            assert torch.equal(ids[slot, :, : want.shape[1]].long(), want)
            assert (ids[slot, :, want.shape[1] :] == -1).all()
            torch.testing.assert_close(heads[slot], alone.attend(query), rtol=0, atol=1e-5)
            self.followed += 1

    def step(self, tokens):
        """Logits by slot, of one token for each slot named; others get nonsense."""
        given = torch.full((self.batch.slots,), 7)
        for slot, token in tokens.items():
            given[slot] = token
        rows = self.batch.step(given).clone()
        return {slot: rows[slot] for slot in tokens}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for slot in list(self.caches):
            self.leave(slot)
        assert self.pool.used_bytes == 0
        self.pool.close()


def small(name, **changes):
    """A budget that leaves much out, and a buffer that has to let tokens go.

    Where keys are rebuilt, a token that was generated has its exact key until it leaves, so that
    who leaves shows in the logits: there nobody has to.
    """
    given = dict(budget=48, attend_on="device")
    if name == "shadowkv":
        given |= dict(rank=40, hot=10.0, options={"outlier_chunks": 1})
    return preset(name, **(given | changes))


def along(batch, texts, tokens):
    """Logits of requests [count + 1, requests, vocab] along `tokens` [count, requests]."""
    joined = [batch.join(text) for text in texts]
    rows = [torch.stack([first for _, first in joined])]
    slots = [slot for slot, _ in joined]
    for row in tokens:
        found = batch.step(dict(zip(slots, row.tolist())))
        rows.append(torch.stack([found[slot] for slot in slots]))
    return torch.stack(rows)


def some_tokens(count, requests):
    return prompt(count * requests).view(count, requests)


@pytest.fixture
def batch_of(monkeypatch):
    """Makes batches in which every request is followed by its twin."""
    attend, choose = SelectedLayer.attend, SelectedLayer._ids
    made = []

    def _ids(self, fresh, lengths):
        self.ids = choose(self, fresh, lengths)
        return self.ids

    def followed(self, fresh, clock, *where):
        heads = attend(self, fresh, clock, *where)
        made[-1].follow(self._number, fresh, clock, self.ids, heads)
        return heads

    def make(*args, **options):
        made.append(Batch(*args, **options))
        return made[-1]

    monkeypatch.setattr(SelectedLayer, "_ids", _ids)
    monkeypatch.setattr(SelectedLayer, "attend", followed)
    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_ragged_requests_selects_and_attends_as_each_does_alone(name, batch_of):
    module, order = build("llama", vocab_size=1000), torch.randperm(1000, generator=SEED)
    # all tokens differ: equal ones have equal unrotated keys, and which of them is better is noise
    texts, tokens = [order[:150], order[150:181], order[181:481]], order[481:541].view(20, 3)
    with batch_of(module, small(name)) as batch:
        along(batch, texts, tokens)
        assert batch.followed == 20 * 3 * 3


@pytest.mark.parametrize("name", ["headrace", "quest", "shadowkv"])
@pytest.mark.parametrize("family", [family for family in GLOBAL if family != "gemma3n"])
def test_at_full_budget_a_batch_is_dense_in_every_family(family, name):
    module, texts, want = dense_of(family, (150, 31), 5)
    method = full(name, budget=500, attend_on="device")
    with Batch(module, method) as batch:
        got = along(batch, texts, want.argmax(-1)[:-1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_with_an_estimated_tail_too(batch_of):
    texts, tokens = [prompt(150), prompt(31), prompt(300)], some_tokens(20, 3)
    with batch_of(build("llama"), small("headrace", tail=True)) as batch:
        along(batch, texts, tokens)
        assert batch.followed == 20 * 3 * 3


def test_outliers_that_a_short_request_has_little_room_for(batch_of):
    method = preset("shadowkv", attend_on="device", rank=40)  # 48 chunks of outliers, of 2,048
    with batch_of(build("llama"), method, room=40, capacity=290) as batch:
        along(batch, [prompt(250), prompt(30)], some_tokens(10, 2))
        assert batch.followed == 10 * 2 * 3


def test_a_budget_of_the_ends_alone_takes_one_token_more_as_it_does_alone(batch_of):
    method = preset("headrace", budget=20, attend_on="device")
    with batch_of(build("llama"), method) as batch:
        along(batch, [prompt(120)], some_tokens(4, 1))
        ours, theirs = batch.leave(0)
    assert ours.selected == theirs.selected == 4 * 3 * 2 * 21


def test_tables_that_have_grown_beyond_a_slot_fit_it():
    """A buffer's table of tokens grows by more than a token; behind the last all are free."""
    with Batch(build("llama"), small("headrace"), slots=1, capacity=100, room=4) as batch:
        batch.join(prompt(96))
        layer = batch.batch._layers[0]
        tables = batch.twins[0].layer(0).rows.hot.tables(300)
        wider = torch.nn.functional.pad(tables.slot, (0, 30), value=-1)
        layer._take(0, tables._replace(slot=wider))
        assert torch.equal(layer._there.slot[0, :, :96].long(), tables.slot[:, :96].long())


def test_requests_join_and_leave_without_a_trace_in_the_others(batch_of):
    texts, tokens = [prompt(200), prompt(90), prompt(120)], some_tokens(30, 3)
    with batch_of(build("qwen3"), small("headrace"), slots=2) as batch:
        slots = {i: batch.join(texts[i])[0] for i in (0, 1)}
        fed = dict.fromkeys(range(3), 0)
        for _ in range(45):
            if 1 in slots and fed[1] == 12:  # the third takes the second's place
                batch.leave(slots.pop(1))
                slots[2] = batch.join(texts[2])[0]
            batch.step({slot: int(tokens[fed[i], i]) for i, slot in slots.items()})
            for i in list(slots):
                fed[i] += 1
                if fed[i] == 30:
                    batch.leave(slots.pop(i))
        assert [fed[i] for i in range(3)] == [30, 12, 30]
        assert batch.followed == 3 * sum(fed.values())


@pytest.mark.parametrize("name", ["headrace", "shadowkv"])
def test_what_is_fetched_ahead_changes_nothing(name):
    module, tokens = build("llama"), some_tokens(30, 2)
    texts = [prompt(280), prompt(130)]
    with Batch(module, small(name)) as batch:
        want = along(batch, texts, tokens)
    with Batch(module, small(name, prefetch="layer")) as batch:
        got = along(batch, texts, tokens)
    assert torch.equal(got, want)


def test_a_batch_counts_what_it_attends_to_and_fetches(batch_of):
    with batch_of(build("llama"), small("headrace")) as batch:
        along(batch, [prompt(300)], some_tokens(20, 1))
        ours, theirs = batch.leave(0)
        row = batch.pool.shape.layout.row_bytes
    assert ours.selected == theirs.selected == 20 * 3 * 2 * 48
    assert ours.steps == theirs.steps == 20
    assert 0 < ours.hits < ours.selected
    assert ours.host_key_rows == ours.selected - ours.hits
    assert abs(ours.hits - theirs.hits) < 0.02 * theirs.hits  # of equal age, others may leave
    assert ours.fetched_bytes == (ours.selected - ours.hits) * row


def test_a_long_answer_in_the_smallest_buffer_stays_what_it_is_alone(batch_of):
    method = small("headrace", hot=1.0, budget=40)
    with batch_of(build("llama"), method, slots=2, room=100) as batch:
        along(batch, [prompt(70)], some_tokens(100, 1))
        assert batch.followed == 100 * 3


def test_a_request_that_has_no_room_is_refused_and_the_batch_goes_on(batch_of):
    with batch_of(build("llama"), small("headrace"), slots=1, capacity=200) as batch:
        with pytest.raises(EngineError, match="200 tokens; 380 were asked for"):
            batch.join(prompt(300))
        along(batch, [prompt(100)], some_tokens(5, 1))
        with pytest.raises(EngineError, match="1 of 1 slots are taken"):
            batch.join(prompt(50))
        batch.step({0: 9})
        assert batch.followed == 6 * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(budget=0.1), "share of the prompt"),
        (dict(top_p=0.9), "top_p"),
        (dict(certify=0.1), "certify"),
        (dict(attend_on="host"), "on the host"),
        (dict(prefetch="layer", hot=1.5), "hot below 2"),
        (dict(budget=20_000), "more than 32767 rows"),
    ],
)
def test_a_method_without_static_shapes_is_refused_with_the_reason(changes, reason):
    method = small("headrace", **changes)
    model = HFModel(build("llama", max_position_embeddings=1 << 16))
    pool = DeviceTier(pool_shape(model, method), 1 << 20)
    assert reason in why_not(model, method, pool)
    with pytest.raises(EngineError, match=reason):
        DeviceBatch(model, method, pool, slots=1, capacity=100)


def test_layers_that_share_kv_are_decoded_request_by_request():
    model, method = HFModel(build("gemma3n")), small("headrace")
    pool = DeviceTier(pool_shape(model, method), 1 << 20)
    with pytest.raises(EngineError, match="layers of this model share their KV"):
        DeviceBatch(model, method, pool, slots=1, capacity=100)
