"""Which tokens are in the hot buffers of a batch, and who makes room for those that are not.

Each row (a KV head of a batch's slot) has S slots of its own and three tables:

    slot  [B, Hk, T] int16   of each token; -1: not here     int16: half of what int32 takes at
    token [B, Hk, S] int32   in each slot; -1: free          128k tokens, 2 MiB a layer of 8 heads
    used  [B, Hk, S] int32   step of its last use; -1: free; PINNED: never leaves

Of the slots not used at this step the first to leave are those free, then those used longest ago
(ages above 255 count as 255), then those with lower numbers. That is exact without sorting: a
histogram of 256 classes, free = 0 and age a = 256 - a, says which class is the last to leave and
how many of it do. Nothing is copied to the host (HiSparse, SGLang 2026).

One program a row, of 512 threads for its tables to be read in few passes. It reads 4 K bytes of
ids, K scattered slots, 4 S bytes of uses twice and the tokens of victims.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int16, Int32, Int64
from torch import Tensor

from kvstore.kernels.put import put
from native.gpu import Build, on_gpu

FREE = -1
PINNED = torch.iinfo(torch.int32).max  # a use that never grows old
OLDEST = 255  # ages are told apart up to here
CLASSES = OLDEST + 1
MOST_SLOTS = torch.iinfo(torch.int16).max
BLOCK = 2048  # ids or slots at once: four a thread
WARPS = 16


class Residency(NamedTuple):
    """Tables of one layer for a batch, all on the device."""

    slot: Int16[Tensor, "B Hk T"]  # of each token; -1: not here
    token: Int32[Tensor, "B Hk S"]  # in each slot; -1: free
    used: Int32[Tensor, "B Hk S"]  # step of the last use; -1: free, PINNED: never leaves


class Resolved(NamedTuple):
    """Where tokens are, and what must be fetched for that to be true."""

    slots: Int32[Tensor, "B Hk K"]  # of each id; -1 where ids is -1
    missing: Int32[Tensor, "B Hk K"]  # tokens that were not there, in the order of ids; -1 behind
    target: Int32[Tensor, "B Hk K"]  # their slots, ascending; -1 behind
    count: Int32[Tensor, "B Hk"]  # type: ignore[assignment]  # how many; hides tuple.count


def empty(
    batch: int, num_kv_heads: int, *, tokens: int, slots: int, device: torch.device | str
) -> Residency:
    """Tables of buffers that hold nothing. Raises ValueError for more slots than int16 counts."""
    if slots > MOST_SLOTS:
        raise ValueError(f"at most {MOST_SLOTS} hot slots, got {slots}: lower method.hot")
    rows = (batch, num_kv_heads)
    return Residency(
        torch.full((*rows, tokens), FREE, dtype=torch.int16, device=device),
        torch.full((*rows, slots), FREE, dtype=torch.int32, device=device),
        torch.full((*rows, slots), FREE, dtype=torch.int32, device=device),
    )


def forget(residency: Residency, b: int) -> None:
    """Nothing is in the buffers of a batch's slot any more."""
    for table in residency:
        table[b].fill_(FREE)


def pin(residency: Residency, slots: Int32[Tensor, "B Hk N"]) -> None:
    """What is in these slots, given by `resolve`, never leaves; -1 names none."""
    _put(residency.used, slots, torch.full_like(slots, PINNED))


def resolve(
    ids: Int32[Tensor, "B Hk K"],
    residency: Residency,
    now: Int32[Tensor, ""],
    counts: Int64[Tensor, "2 B Hk"] | None = None,
) -> Resolved:
    """Find tokens; give those that are missing slots, which are theirs from now on.

    Mutates the tables. The caller writes the rows of what was missing before anybody reads them.
    If fewer slots may leave than are needed, the last of the missing go without: they are not
    listed, and their slots are -1.

    Args:
        ids: each once a row; -1, at the end, where there are fewer.
        now: the step, from 0 up; what was used at this step does not leave.
        counts: of every row, how many tokens were asked for and how many listed, added to it.
    Raises:
        ValueError: if a row asks for more tokens than it has slots, or tables are not contiguous.
    """
    if ids.shape[2] > residency.token.shape[2]:
        raise ValueError(
            f"{ids.shape[2]} tokens at once, and {residency.token.shape[2]} hot slots: raise "
            "method.hot"
        )
    if not all(table.is_contiguous() for table in residency):
        raise ValueError(f"tables must be contiguous: {[x.stride() for x in residency]}")
    run = resolve_triton if on_gpu(ids, *residency, now, counts) else resolve_torch
    return run(ids, residency, now, counts)


def resolve_torch(
    ids: Int32[Tensor, "B Hk K"],
    residency: Residency,
    now: Int32[Tensor, ""],
    counts: Int64[Tensor, "2 B Hk"] | None = None,
) -> Resolved:
    """The definition."""
    slot, token, used = residency
    asked = ids >= 0
    at = slot.gather(2, ids.clamp_min(0).long()).int().where(asked, FREE)
    _put(used, at, used.gather(2, at.clamp_min(0).long()).maximum(now))
    miss = asked & (at < 0)
    target = _victims(used, now, miss.sum(2, keepdim=True), ids.shape[2])
    listed = target >= 0
    order = miss.logical_not().int().argsort(dim=2, stable=True)
    missing = ids.gather(2, order).where(listed, -1)
    nth = miss.long().cumsum(2).sub_(1).clamp_min_(0)
    slots = torch.where(miss, target.gather(2, nth), at)
    old = token.gather(2, target.clamp_min(0).long()).where(listed, -1)
    _put(slot, old, torch.full_like(old, FREE))
    _put(slot, missing, target)
    _put(token, target, missing)
    _put(used, target, now.expand_as(target))
    count = listed.sum(2, dtype=torch.int32)
    if counts is not None:
        counts.add_(torch.stack([asked.sum(2), count]))
    return Resolved(slots, missing, target, count)


def _victims(
    used: Int32[Tensor, "B Hk S"], now: Tensor, need: Tensor, most: int
) -> Int32[Tensor, "B Hk K"]:
    """Slots that leave, `need` [B, Hk, 1] of each row where so many may, ascending; -1 behind."""
    count = used.shape[2]
    classes = CLASSES - (now - used).clamp_max(OLDEST)
    classes = classes.where(used >= 0, 0).where(used < now, CLASSES)
    found, slots = classes.sort(stable=True, dim=2)
    nth = torch.arange(most, device=used.device)
    leaves = (found[..., :most] < CLASSES) & (nth < need)
    slots = slots[..., :most].where(leaves, count).sort(2).values
    return slots.where(slots < count, -1).int()


def _put(table: Tensor, at: Tensor, values: Tensor) -> None:
    """table[b, h, at[b, h, i]] = values[b, h, i], where `at` is not -1."""
    batch, heads, width = table.shape
    rows = torch.arange(batch * heads, device=at.device).view(batch, heads, 1) * width
    number = (rows + at).where(at >= 0, -1)
    put(table.view(-1), number.flatten(), values.to(table.dtype).flatten())


def resolve_triton(
    ids: Int32[Tensor, "B Hk K"],
    residency: Residency,
    now: Int32[Tensor, ""],
    counts: Int64[Tensor, "2 B Hk"] | None = None,
) -> Resolved:
    """By the kernel."""
    assert counts is None or counts.is_contiguous(), "rows lie side by side"
    batch, heads, most = ids.shape
    slots, missing, target = (torch.empty_like(ids, memory_format=torch.contiguous_format)
                              for _ in range(3))  # fmt: skip
    found = Resolved(slots, missing, target, ids.new_empty(batch, heads))
    sizes = most, residency.token.shape[2], residency.slot.shape[2]
    _resolve[(batch * heads,)](
        ids.contiguous(), *residency, now, *found, counts, *sizes,
        OLDEST=OLDEST, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return found


@triton.jit
@no_type_check
def _resolve(
    ids, slot, token, used, now, slots, missing, target, count, counts, K, S, T,
    OLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot += row * T
    token += row * S
    used += row * S
    slots += row * K
    missing += row * K
    target += row * K
    time = tl.load(now)
    asked, need = _find(ids + row * K, slot, used, time, slots, missing, target, K, BLOCK)
    given = tl.full((), 0, tl.int32)
    tl.debug_barrier()  # uses and lists are read by other threads than wrote them
    if need > 0:
        last, ties, given = _last_to_leave(used, time, need, S, OLDEST, BLOCK)
        _give(slot, token, used, time, slots, missing, target, last, ties, S, OLDEST, BLOCK)
    tl.store(count + row, given)
    if counts is not None:
        tl.atomic_add(counts + row, asked.to(tl.int64), sem="relaxed")
        listed = counts + tl.num_programs(0) + row
        tl.atomic_add(listed, given.to(tl.int64), sem="relaxed")
    for first in range(0, K, BLOCK):
        at = first + tl.arange(0, BLOCK)
        behind = (at >= given) & (at < K)
        tl.store(missing + at, -1, mask=behind)
        tl.store(target + at, -1, mask=behind)


@triton.jit
@no_type_check
def _find(ids, slot, used, time, slots, missing, target, K, BLOCK: tl.constexpr):
    """Touch what is there, list what is not; `target` says meanwhile which of ids it was."""
    count, need = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(0, K, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(ids + at, mask=at < K, other=-1)
        asked = token >= 0
        here = tl.load(slot + token, mask=asked, other=-1).to(tl.int32)
        tl.atomic_max(used + here, time, mask=here >= 0, sem="relaxed")  # PINNED is the largest
        tl.store(slots + at, here, mask=at < K)
        miss = (asked & (here < 0)).to(tl.int32)
        nth = need + tl.cumsum(miss, 0) - 1
        tl.store(missing + nth, token, mask=miss > 0)
        tl.store(target + nth, at, mask=miss > 0)
        count += tl.sum(asked.to(tl.int32), 0)
        need += tl.sum(miss, 0)
    return count, need


@triton.jit
@no_type_check
def _class(used, time, OLDEST: tl.constexpr):
    """Free 0, then from the oldest down; above OLDEST what must not leave."""
    aged = OLDEST + 1 - tl.minimum(time - used, OLDEST)
    return tl.where(used < time, tl.where(used < 0, 0, aged), OLDEST + 2)


@triton.jit
@no_type_check
def _last_to_leave(used, time, need, S, OLDEST: tl.constexpr, BLOCK: tl.constexpr):
    """The first class not all of which leaves, how many of it do, and how many leave in all."""
    CLASSES: tl.constexpr = OLDEST + 1
    sizes = tl.zeros([CLASSES], tl.int32)
    for first in range(0, S, BLOCK):
        at = first + tl.arange(0, BLOCK)
        classes = _class(tl.load(used + at, mask=at < S, other=time), time, OLDEST)
        sizes += tl.histogram(classes, CLASSES, mask=classes < CLASSES)
    whole = tl.cumsum(sizes, 0) < need
    last = tl.sum(whole.to(tl.int32), 0)
    ties = need - tl.sum(tl.where(whole, sizes, 0), 0)
    return last, ties, tl.minimum(need, tl.sum(sizes, 0))


@triton.jit
@no_type_check
def _give(
    slot, token, used, time, slots, missing, target, last, ties, S,
    OLDEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The n-th slot that leaves goes to the n-th that is missing."""
    before = tl.full((), 0, tl.int32)
    for first in range(0, S, BLOCK):
        at = first + tl.arange(0, BLOCK)
        classes = _class(tl.load(used + at, mask=at < S, other=time), time, OLDEST)
        # two counts in one scan: low those that leave for sure, high those of the last class
        mine = tl.where(classes < last, 1, tl.where(classes == last, 1 << 16, 0))
        counts = before + tl.cumsum(mine, 0) - mine
        sure, tied = counts & 0xFFFF, counts >> 16
        leaves = (classes < last) | ((classes == last) & (tied < ties))
        nth = sure + tl.minimum(tied, ties)
        old = tl.load(token + at, mask=leaves, other=-1)
        new = tl.load(missing + nth, mask=leaves, other=0)
        which = tl.load(target + nth, mask=leaves, other=0)
        tl.debug_barrier()  # all of them are read before one of them is overwritten
        tl.store(slot + old, -1, mask=old >= 0)
        tl.store(slot + new, at, mask=leaves)
        tl.store(token + at, new, mask=leaves)
        tl.store(used + at, time, mask=leaves)
        tl.store(target + nth, at, mask=leaves)
        tl.store(slots + which, at, mask=leaves)
        before += tl.sum(mine, 0)


def _build(name: str, *, counted: bool) -> Build:
    constants = {"OLDEST": OLDEST, "BLOCK": BLOCK} | ({} if counted else {"counts": None})
    signature = dict.fromkeys(("ids", "token", "used", "now"), "*i32")
    signature |= dict.fromkeys(("slots", "missing", "target", "count"), "*i32")
    signature |= {"slot": "*i16", "counts": "*i64", "K": "i32", "S": "i32", "T": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    spills = "a few numbers, on sm_100: so many warps leave a thread 64 registers"
    return Build(name, _resolve, signature, constants, WARPS, 1, spills)


AOT = [_build("resolve", counted=False), _build("resolve, counted", counted=True)]
