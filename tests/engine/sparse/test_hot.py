"""The hot buffer against a plain dictionary with the same rule: least recently used goes first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sparse.hot import HotBuffer
from kvstore.rows import Raw, RowLayout

HEADS, DIM = 2, 16
LAYOUT = RowLayout(Raw(torch.float32), Raw(torch.float32), DIM, torch.float32)
CPU = torch.device("cpu")


def kv(tokens):
    """Keys and values that say whose they are."""
    heads = torch.arange(HEADS)[:, None]
    k = (tokens + 1000 * heads)[..., None].expand(-1, -1, DIM).float()
    return k, -k


def fetched(buffer, tokens):
    """What `SparseLayer` does: resolve, and fill what misses."""
    slots, miss = buffer.resolve(tokens)
    k, v = kv(tokens)
    heads = torch.arange(HEADS)[:, None].expand_as(miss)[miss]
    buffer.write(slots[miss], heads, LAYOUT.encode(k, v)[miss])
    return slots, miss


def holds(buffer, slots, tokens):
    found, (k, v) = buffer.read(slots), kv(tokens)
    return torch.equal(found.k, k) and torch.equal(found.v, v)


calls = st.lists(
    st.lists(st.lists(st.integers(0, 40), min_size=6, max_size=6, unique=True), min_size=HEADS,
             max_size=HEADS),
    max_size=30,
)  # fmt: skip


@settings(max_examples=60)
@given(calls=calls, slots=st.integers(6, 14))
def test_it_is_a_dictionary_that_forgets_what_was_used_longest_ago(calls, slots):
    buffer, oracle = HotBuffer(HEADS, slots, LAYOUT, CPU), [{} for _ in range(HEADS)]
    for now, asked in enumerate(calls):
        tokens = torch.tensor(asked)
        placed, miss = fetched(buffer, tokens)
        assert holds(buffer, placed, tokens)
        for head, mine in enumerate(asked):
            known = oracle[head]
            assert miss[head].tolist() == [token not in known for token in mine]
            known |= dict.fromkeys(mine, now)
            while len(known) > slots:  # those of one call are of one age: any of them may go
                del known[min(known, key=lambda t: (known[t], _gone(buffer, head, t)))]


def _gone(buffer, head, token):
    """0 for what the buffer has forgotten: of equal age, its choice is as good as ours."""
    return int(buffer._slot[head, token] >= 0)


def test_what_is_asked_for_now_is_never_evicted_for_it():
    buffer = HotBuffer(HEADS, 4, LAYOUT, CPU)
    fetched(buffer, torch.tensor([[0, 1, 2, 3]] * HEADS))
    tokens = torch.tensor([[3, 9, 0, 8]] * HEADS)
    slots, miss = fetched(buffer, tokens)
    assert miss[0].tolist() == [False, True, False, True]
    assert holds(buffer, slots, tokens)


def test_more_tokens_than_slots_are_refused_with_the_setting_to_raise():
    buffer = HotBuffer(HEADS, 4, LAYOUT, CPU)
    fetched(buffer, torch.tensor([[0, 1, 2]] * HEADS))
    with pytest.raises(ValueError, match=r"method\.hot"):
        buffer.resolve(torch.tensor([[3, 4, 5, 6, 7]] * HEADS))
    buffer.insert(torch.tensor([[10, 11, 12]] * HEADS), *kv(torch.tensor([[10, 11, 12]] * HEADS)),
                  pinned=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"method\.hot"):
        buffer.resolve(torch.tensor([[3, 4]] * HEADS))


def test_pinned_tokens_stay_whatever_else_is_used():
    buffer, kept = HotBuffer(HEADS, 5, LAYOUT, CPU), torch.tensor([[0, 7]] * HEADS)
    buffer.insert(kept, *kv(kept), pinned=True)
    for start in range(10, 40, 3):
        fetched(buffer, torch.arange(start, start + 3).expand(HEADS, -1))
    slots, miss = buffer.resolve(kept)
    assert not miss.any()
    assert holds(buffer, slots, kept)


def test_a_pinned_token_that_was_used_is_pinned_still():
    buffer, kept = HotBuffer(HEADS, 3, LAYOUT, CPU), torch.tensor([[0]] * HEADS)
    buffer.insert(kept, *kv(kept), pinned=True)
    buffer.resolve(kept)
    for token in range(1, 9):
        fetched(buffer, torch.full((HEADS, 2), 2 * token) + torch.arange(2))
    assert not buffer.resolve(kept).miss.any()


def test_the_same_token_twice_is_right_in_both_places():
    buffer, tokens = HotBuffer(HEADS, 6, LAYOUT, CPU), torch.tensor([[5, 5, 6]] * HEADS)
    slots, _ = fetched(buffer, tokens)
    assert holds(buffer, slots, tokens)
    for start in range(10, 30, 3):  # and nothing is left that leads to another token's row
        tokens = torch.arange(start, start + 3).expand(HEADS, -1)
        assert holds(buffer, fetched(buffer, tokens)[0], tokens)
    slots, _ = fetched(buffer, torch.tensor([[5, 6]] * HEADS))
    assert holds(buffer, slots, torch.tensor([[5, 6]] * HEADS))


def test_nothing_asked_is_nothing_found():
    buffer = HotBuffer(HEADS, 4, LAYOUT, CPU)
    slots, miss = buffer.resolve(torch.empty(HEADS, 0, dtype=torch.int64))
    assert slots.shape == miss.shape == (HEADS, 0)
