"""Who is in the hot buffers: kernel and definition against lists, dicts and sorting."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.kernels import resolve as module
from kvstore.kernels.append import append_torch
from kvstore.kernels.gather import gather_torch
from kvstore.kernels.part import hot_rows
from kvstore.kernels.put import put
from kvstore.kernels.resolve import (
    PINNED,
    Resolved,
    empty,
    forget,
    pin,
    resolve,
    resolve_torch,
    resolve_triton,
)
from kvstore.rows import Int4, Int8, RowLayout

WAYS = [resolve_torch, resolve_triton]


class Row:
    """The tables of one head, kept by the rule."""

    def __init__(self, slots):
        self.token, self.used, self.slot = [-1] * slots, [-1] * slots, {}

    def resolve(self, ids, now):
        ids = [token for token in ids if token >= 0]
        for token in ids:
            if token in self.slot:
                self.used[self.slot[token]] = max(now, self.used[self.slot[token]])
        missing = [token for token in ids if token not in self.slot]
        free_to_go = [s for s, used in enumerate(self.used) if used < now]
        target = sorted(sorted(free_to_go, key=lambda s: self.turn(s, now))[: len(missing)])
        missing = missing[: len(target)]
        for token, slot in zip(missing, target):
            self.slot.pop(self.token[slot], None)
            self.slot[token], self.token[slot], self.used[slot] = slot, token, now
        return [self.slot.get(token, -1) for token in ids], missing, target

    def turn(self, slot, now):
        age = now - self.used[slot]
        return (256 if self.token[slot] < 0 else min(age, 255)) * -1, slot


def step(now):
    return torch.tensor(now, dtype=torch.int32)


def padded(rows, width):
    return torch.tensor([[(row + [-1] * width)[:width] for row in head] for head in rows]).int()


def drawn(rng, batch, heads, most, tokens):
    """Ids of which some repeat from step to step, ragged, some rows empty."""

    def row():
        count = rng.choice([0, 1, most, rng.randint(0, most)])
        hot = range(min(tokens, 2 * most)) if rng.random() < 0.7 else range(tokens)
        return rng.sample(hot, min(count, len(hot)))

    return [[row() for _ in range(heads)] for _ in range(batch)]


def check(residency, rows, ids, found, now):
    """All of what was found, and all tables, are those of the oracle."""
    most, batch, heads = found.slots.shape[2], len(ids), len(ids[0])
    want = [[rows[b][h].resolve(ids[b][h], now) for h in range(heads)] for b in range(batch)]
    for got, part in zip(found[:3], range(3)):
        assert torch.equal(got, padded([[x[part] for x in row] for row in want], most))
    assert found.count.tolist() == [[len(x[1]) for x in row] for row in want]
    for b in range(batch):
        for h in range(heads):
            row = rows[b][h]
            assert residency.token[b, h].tolist() == row.token
            assert residency.used[b, h].tolist() == row.used
            there = (residency.slot[b, h] >= 0).nonzero().flatten().tolist()
            assert {t: int(residency.slot[b, h, t]) for t in there} == row.slot


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), most=st.integers(1, 9), spare=st.sampled_from([0, 0, 3, 20]))
def test_thirty_steps_are_those_of_the_rule(way, seed, most, spare):
    rng = random.Random(seed)
    batch, heads, tokens = rng.randint(1, 2), rng.randint(1, 2), most + rng.randint(0, 40)
    pins = rng.randint(0, spare)
    slots = most + spare
    residency = empty(batch, heads, tokens=tokens, slots=slots, device="cpu")
    rows = [[Row(slots) for _ in range(heads)] for _ in range(batch)]
    now = 0
    for turn in range(30):
        now += rng.choice([1, 1, 1, 100, 300])
        ids = drawn(rng, batch, heads, most, tokens)
        found = way(padded(ids, most), residency, step(now))
        check(residency, rows, ids, found, now)
        if turn == 3 and pins:
            pinned = found.slots[..., : min(pins, most)]
            pin(residency, pinned)
            for b in range(batch):
                for h in range(heads):
                    for slot in pinned[b, h].tolist():
                        if slot >= 0:
                            rows[b][h].used[slot] = PINNED
        if turn == 20:
            forget(residency, batch - 1)
            rows[batch - 1] = [Row(slots) for _ in range(heads)]


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
@pytest.mark.parametrize("block", [8, 64])
def test_tables_of_many_blocks_are_read_as_one(way, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    rng = random.Random(block)
    rows, residency = [[Row(90)]], empty(1, 1, tokens=600, slots=90, device="cpu")
    for now in (1, 2, 3, 5, 400):
        ids = [[rng.sample(range(150), rng.choice([40, 70]))]]
        check(residency, rows, ids, way(padded(ids, 75), residency, step(now)), now)


def test_the_largest_buffer_is_resolved_alike():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randperm(30000, generator=rng)[:8192].int().view(1, 1, -1)
    tables = [empty(1, 1, tokens=30000, slots=20480, device="cpu") for _ in WAYS]
    for now in (1, 2, 3, 4):
        again = torch.randperm(30000, generator=rng)[:8192].int().view(1, 1, -1)
        ids = torch.cat(
            [ids[..., :3000], again[~torch.isin(again, ids[..., :3000])].view(1, 1, -1)], 2
        )
        ids = ids[..., :8192].contiguous()
        both = [way(ids, x, step(now)) for way, x in zip(WAYS, tables)]
        for one, other in zip((*both[0], *tables[0]), (*both[1], *tables[1])):
            assert torch.equal(one, other)
    assert int(both[0].count) > 2000


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_free_slots_go_first_then_the_oldest_and_of_one_age_the_lower_numbers(way):
    residency = empty(1, 1, tokens=50, slots=6, device="cpu")

    def asked(now, *ids):
        return way(padded([[list(ids)]], 4), residency, step(now))

    asked(1, 10, 11)
    asked(2, 12, 13)
    found = asked(300, 11, 14, 15)  # 11 is in slot 1; free are 4 and 5
    assert found.slots.flatten().tolist() == [1, 4, 5, -1]
    assert found.missing.flatten().tolist() == [14, 15, -1, -1]
    found = asked(301, 16, 17)  # steps 1 and 2 are both more than 255 ago
    assert found.target.flatten().tolist() == [0, 2, -1, -1]
    found = asked(302, 18, 10)
    assert found.target.flatten().tolist() == [1, 3, -1, -1]  # 3, of step 2, then 1 of step 300
    assert residency.token.flatten().tolist() == [16, 18, 17, 10, 14, 15]


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_ages_are_told_apart_up_to_255(way):
    residency = empty(1, 1, tokens=50, slots=6, device="cpu")
    for token, now in enumerate((303, 302, 301, 300, 299, 1)):
        way(padded([[[token]]], 1), residency, step(now))
    ages = [step(556) - used for used in residency.used.flatten()]
    assert [int(age) for age in ages] == [253, 254, 255, 256, 257, 555]
    found = [way(padded([[[token]]], 1), residency, step(556)) for token in range(20, 26)]
    assert [int(x.target) for x in found] == [2, 3, 4, 5, 1, 0]


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_what_is_used_now_or_pinned_never_leaves_and_the_rest_goes_without(way):
    residency = empty(1, 1, tokens=50, slots=4, device="cpu")
    way(padded([[[0, 1]]], 4), residency, step(1))
    pin(residency, padded([[[0, 1]]], 2))
    way(padded([[[2]]], 4), residency, step(2))
    found = way(padded([[[3, 4, 5, 2]]], 4), residency, step(2))
    assert found.slots.tolist() == [[[3, -1, -1, 2]]]
    assert (found.missing.tolist(), found.count.tolist()) == ([[[3, -1, -1, -1]]], [[1]])
    assert residency.used.tolist() == [[[PINNED, PINNED, 2, 2]]]
    assert int((residency.slot >= 0).sum()) == 4


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_what_is_asked_for_and_listed_is_counted_row_by_row(way):
    residency = empty(2, 1, tokens=50, slots=3, device="cpu")
    counts = torch.full((2, 2, 1), 1 << 40)
    for now, ids in ((1, [[[1, 2]], [[]]]), (2, [[[2, 3, 4]], [[9]]])):
        way(padded(ids, 3), residency, step(now), counts)
    way(padded([[[5, 6]], [[9]]], 3), residency, step(2), counts)  # nothing of the first may leave
    assert (counts - (1 << 40)).squeeze(2).tolist() == [[7, 2], [4, 1]]


@pytest.mark.parametrize("way", WAYS, ids=["torch", "triton"])
def test_rows_that_ask_for_nothing_change_nothing(way):
    residency = empty(2, 2, tokens=9, slots=4, device="cpu")
    way(padded([[[1, 2], [3]], [[4], []]], 2), residency, step(1))
    before = [table.clone() for table in residency]
    found = way(torch.full((2, 2, 3), -1, dtype=torch.int32), residency, step(2))
    assert isinstance(found, Resolved)
    assert all((x == -1).all() for x in found[:3])
    assert not found.count.any()
    assert all(torch.equal(x, y) for x, y in zip(before, residency))


def test_more_tokens_than_slots_are_refused():
    residency = empty(1, 1, tokens=9, slots=4, device="cpu")
    with pytest.raises(ValueError, match=r"5 tokens at once, and 4 hot slots: raise method\.hot"):
        resolve(torch.zeros(1, 1, 5, dtype=torch.int32), residency, step(1))
    with pytest.raises(ValueError, match=r"at most 32767 hot slots, got 32768"):
        empty(1, 1, tokens=9, slots=32768, device="cpu")
    strided = residency._replace(slot=residency.slot.repeat(1, 1, 2)[..., ::2])
    with pytest.raises(ValueError, match="tables must be contiguous"):
        resolve(padded([[[7, 3]]], 4), strided, step(1))
    found = resolve(padded([[[7, 3]]], 4), residency, step(1))
    assert found.slots.tolist() == [[[0, 1, -1, -1]]]


def test_definitions_do_not_look_at_data():
    """On tensors without data: what would wait for a GPU, or cannot be captured, raises."""
    residency = empty(2, 3, tokens=99, slots=9, device="meta")
    ids = torch.empty(2, 3, 5, dtype=torch.int32, device="meta")
    counts = torch.empty(2, 2, 3, dtype=torch.int64, device="meta")
    found = resolve_torch(ids, residency, torch.empty((), dtype=torch.int32, device="meta"), counts)
    pin(residency, found.slots)
    layout = RowLayout(Int8(), Int4(), 64, torch.float16)
    blocks, hot = (torch.empty(2, 7, device="meta").int(), hot_rows(layout))
    slab = torch.empty(8, 3, 16, layout.row_bytes, dtype=torch.uint8, device="meta")
    memory = torch.empty(2, 3, 9, hot.row_bytes, dtype=torch.uint8, device="meta")
    gather_torch(slab, blocks, layout, found, memory, hot)
    kv = torch.empty(2, 2, 3, 64, dtype=torch.float16, device="meta")
    slots, positions = found.slots[..., 0], blocks[:, 0]
    append_torch(*kv, positions, slab, blocks, layout, memory, hot, slots)


@given(st.lists(st.integers(-1, 5), max_size=6, unique_by=lambda x: x if x >= 0 else object()))
def test_put_writes_where_there_is_something_to_write(at):
    at = [-1, *at]
    memory = torch.arange(12).view(6, 2)
    want, values = memory.clone(), 100 + torch.arange(2 * len(at)).view(-1, 2)
    for i, row in enumerate(at):
        if row >= 0:
            want[row] = values[i]
    put(memory, torch.tensor(at), values)
    assert torch.equal(memory, want)


@pytest.mark.gpu
def test_a_gpu_resolves_large_tables_as_the_definition_does():
    generator = torch.Generator().manual_seed(0)
    batch, heads, most, slots, tokens = 3, 8, 2048, 5000, 20000
    here = empty(batch, heads, tokens=tokens, slots=slots, device="cpu")
    there = empty(batch, heads, tokens=tokens, slots=slots, device="cuda")
    counts = torch.zeros(2, batch, heads, dtype=torch.int64)
    counted = counts.cuda()
    for now in (1, 2, 3, 4, 300, 301, 302):
        # a third of all tokens, most of them asked for again and again; the last request ragged
        score = torch.rand(batch, heads, tokens, generator=generator) + torch.rand(tokens)
        ids = score.topk(most, 2).indices.int()
        ids[-1, :, int(torch.randint(most, (), generator=generator)) :] = -1
        want = resolve_torch(ids, here, step(now), counts)
        got = resolve(ids.cuda(), there, step(now).cuda(), counted)
        if now == 2:
            pin(here, want.slots[..., :64].contiguous())
            pin(there, got.slots[..., :64].contiguous())
        for one, other in zip((*got, *there, counted), (*want, *here, counts)):
            assert torch.equal(one.cpu(), other)
