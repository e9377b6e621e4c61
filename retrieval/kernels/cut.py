"""The largest keys of long rows, each of which is cut into parts for many programs.

A row that one program searched would be read up to 32 times by one of 132 processors. So it is
searched among few keys, that are sure to hold the largest k = min(budget, length):

    peaks    the largest key of each of N >= 2 * budget sets of tokens; set i is all t = i mod N
    bound    the k-th largest peak: k keys at least reach it, and few more, 1.4 k in random order
    tally    of each part, how many keys reach the bound, and how many lie above it
    gather   those that reach it, in their order, to room for 4 N; none if there are more
    finish   the search among what was gathered (in the whole row if nothing was), and the ids

(`choose.h` does the same on a CPU.) If fewer than k keys lie above the bound, it is the k-th
largest key itself, and nothing is searched: rows of equal keys cost no more than others. Counts
stay on the device; they end loops, and decide no launch.

    keys [B, Hk, T]  read three times, 4 bytes a key     found [rows, 2, room]  keys, then tokens
    peaks [rows, N]     bound [rows]     tally [rows, 2, parts]  reached, above

Parts have 4,096 keys, 16 to each of 256 threads in four reads of 16 bytes; programs of peaks read
16 keys of 128 sets at a time. At 128k tokens, 8 rows and 2,048 tokens to take there are 256
programs of each. The two searches have 512 threads with 8 keys each in registers, as many as there
are peaks then, and more than what is gathered.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from native.gpu import Build
from retrieval.kernels.group import LOWEST, WORDS

RUN = 4096  # keys that a search keeps in registers
WARPS = 16  # of a search
PART = 4096
SETS = 2048  # at least, so that there are programs enough
ROOM = 4  # for what is gathered, times the number of sets
WIDE = tl.constexpr(21)  # bits of a count: of less than 2 million tokens
WIDE_MASK = tl.constexpr((1 << 21) - 1)
DEPTH, WIDTH = 16, 128  # keys of so many sets that a program reads at once


def sets_of(budget: int) -> int:
    """Into how many sets a row is divided: at least two for each token that is taken."""
    return max(SETS, triton.next_power_of_2(2 * budget))


def choose_cut(
    keys: Int32[Tensor, "B Hk T"], lengths: Int32[Tensor, " B"], budget: int
) -> Int32[Tensor, "B Hk K"]:
    """`choose.choose`, with many programs for each row; five launches."""
    assert keys.is_contiguous(), "rows lie side by side"
    batch, heads, capacity = keys.shape
    assert capacity < 1 << WIDE.value, "counts have so many bits"
    rows, parts, sets = batch * heads, triton.cdiv(capacity, PART), sets_of(budget)
    room = min(ROOM * sets, capacity)
    peaks, bound, tally, found, out = (
        torch.empty(rows, *shape, dtype=torch.int32, device=keys.device)
        for shape in ((sets,), (), (2, parts), (2, room), (budget,))
    )
    of, some = (capacity, heads), triton.next_power_of_2(parts)
    peaks_kernel[sets // WIDTH, rows](
        keys, lengths, peaks, *of, SETS=sets, DEPTH=DEPTH, WIDTH=WIDTH
    )
    bound_kernel[rows,](
        *(peaks, lengths, bound, budget, heads), SETS=sets, RUN=min(RUN, sets), num_warps=WARPS
    )
    cut = parts, rows
    tally_kernel[cut](keys, lengths, bound, tally, *of, parts, PART=PART, num_warps=8)
    gather_kernel[cut](
        *(keys, lengths, bound, tally, found, *of, parts, room),
        **dict(PART=PART, PARTS=some, num_warps=WARPS),
    )
    finish_kernel[rows,](
        *(keys, lengths, bound, tally, found, out, *of, parts, room, budget),
        **dict(RUN=RUN, PARTS=some, num_warps=WARPS),
    )
    return out.view(batch, heads, budget)


@triton.jit
@no_type_check
def some_keys(row, i, length, capacity):
    """Keys of tokens `i` of a row, LOWEST where they do not exist.

    The mask is rounded up to 16 bytes, or else threads would read single words.
    """
    key = tl.load(row + i, (i < tl.cdiv(length, WORDS) * WORDS) & (i < capacity), other=LOWEST)
    return tl.where(i < length, key, LOWEST)


@triton.jit
@no_type_check
def least_of(row, length, capacity, k, RUN: tl.constexpr):
    """An integer that k keys reach, so that no more do or the next larger has fewer; how many do.

    Made from its highest bits on, two at a time: of four digits the largest with which k keys reach
    it. The counts of three are one number of 64 bits, as its sum over a program is what takes time.
    """
    run = tl.arange(0, RUN)
    first = some_keys(row, run, length, capacity)
    least, one = tl.full([], LOWEST, tl.int32), tl.full([], 1, tl.int32)
    count, bit = length, one * 30
    while (bit >= 0) & (count > k):
        reach = _reaching(first, least, bit)
        for start in range(RUN, length, RUN):
            reach += _reaching(some_keys(row, start + run, length, capacity), least, bit)
        reached, below = _summed(reach), least
        for digit in tl.static_range(1, 4):
            some = ((reached >> (digit - 1) * WIDE) & WIDE_MASK).to(tl.int32)
            stays = some >= k  # of no digit behind one with which fewer reach it
            least = tl.where(stays, below ^ (one * digit << bit), least)
            count = tl.where(stays, some, count)
        bit -= 2
    return least, count


@triton.jit
@no_type_check
def _reaching(key, least, bit):
    """Whether keys reach `least` with each of the digits 1, 2 and 3 at a place: counts, 10 bits."""
    one = tl.full([], 1, tl.int32)
    found = (key >= (least ^ (one << bit))).to(tl.int32)
    found += (key >= (least ^ (one * 2 << bit))).to(tl.int32) << 10
    return found + ((key >= (least ^ (one * 3 << bit))).to(tl.int32) << 20)


@triton.jit
@no_type_check
def _summed(reach):
    """Three counts of a program, of WIDE bits each, in one sum."""
    wide = (reach & 1023).to(tl.int64)
    wide += ((reach >> 10) & 1023).to(tl.int64) << WIDE
    return tl.sum(wide + ((reach >> 20).to(tl.int64) << 2 * WIDE), 0)


@triton.jit
@no_type_check
def take(row, tokens, listed, length, capacity, least, skipped, out, RUN: tl.constexpr):
    """Tokens whose keys lie above `least`, and those that equal it but for the first `skipped`.

    Args:
        tokens: of the keys, where they are `listed`; else the key's place is its token.
    """
    above_before, equal_before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, length, RUN):
        i = start + tl.arange(0, RUN)
        key = some_keys(row, i, length, capacity)
        token = tl.where(listed, tl.load(tokens + i, (i < length) & listed, other=0), i)
        above, equal = (key > least).to(tl.int32), ((key == least) & (i < length)).to(tl.int32)
        both = above + (equal << 16)  # two counts in one scan
        before = tl.cumsum(both, 0) - both
        equals = equal_before + (before >> 16)
        place = above_before + (before & 0xFFFF) + tl.maximum(equals - skipped, 0)
        tl.store(out + place, token, (above | (equal & (equals >= skipped).to(tl.int32))) != 0)
        total = tl.sum(both, 0)
        above_before += total & 0xFFFF
        equal_before += total >> 16


@triton.jit
@no_type_check
def fill(out, first, end, RUN: tl.constexpr):
    """-1 in [first, end)."""
    for start in range(first, end, RUN):
        i = start + tl.arange(0, RUN)
        tl.store(out + i, tl.full([RUN], -1, tl.int32), i < end)


@triton.jit
@no_type_check
def peaks_kernel(
    keys, lengths, peaks, capacity, heads,
    SETS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The largest key of WIDTH sets; LOWEST of one that is empty."""
    row, first = tl.program_id(1), tl.program_id(0) * WIDTH
    length = tl.load(lengths + row // heads)
    if length == 0:
        return
    keys += row.to(tl.int64) * capacity
    column = first + tl.arange(0, WIDTH)
    token = tl.arange(0, DEPTH)[:, None] * SETS + column[None, :]
    most = tl.full([DEPTH, WIDTH], LOWEST, tl.int32)
    for start in range(0, length, DEPTH * SETS):
        most = tl.maximum(most, some_keys(keys, start + token, length, capacity))
    tl.store(peaks + row.to(tl.int64) * SETS + column, tl.max(most, 0))


@triton.jit
@no_type_check
def bound_kernel(
    peaks, lengths, bound, budget, heads, SETS: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """A number that min(budget, length) of a row's peaks reach."""
    row = tl.program_id(0)
    length = tl.load(lengths + row // heads)
    least = tl.full([], LOWEST, tl.int32)
    if length > budget:
        least, _ = least_of(peaks + row.to(tl.int64) * SETS, SETS, SETS, budget, RUN)
    tl.store(bound + row, least)


@triton.jit
@no_type_check
def tally_kernel(
    keys, lengths, bound, tally, capacity, heads, parts, PART: tl.constexpr
):  # fmt: skip
    """How many keys of a part reach the bound, and how many lie above it."""
    part, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row // heads)
    tally += row.to(tl.int64) * 2 * parts + part
    reached, above = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    if part * PART < length:
        least = tl.load(bound + row)
        i = part * PART + tl.arange(0, PART)
        key = some_keys(keys + row.to(tl.int64) * capacity, i, length, capacity)
        reached = tl.sum(((key >= least) & (i < length)).to(tl.int32), 0)
        above = tl.sum((key > least).to(tl.int32), 0)
    tl.store(tally, reached)
    tl.store(tally + parts, above)


@triton.jit
@no_type_check
def gather_kernel(
    keys, lengths, bound, tally, found, capacity, heads, parts, room,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What reaches the bound in a part, keys and tokens; nothing if it is more than `room`."""
    part, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row // heads)
    if part * PART >= length:
        return
    some = tl.arange(0, PARTS)
    reached = tl.load(tally + row.to(tl.int64) * 2 * parts + some, some < parts, other=0)
    if tl.sum(reached, 0) > room:
        return
    i = part * PART + tl.arange(0, PART)
    key = some_keys(keys + row.to(tl.int64) * capacity, i, length, capacity)
    taken = ((key >= tl.load(bound + row)) & (i < length)).to(tl.int32)
    place = tl.sum(tl.where(some < part, reached, 0), 0) + tl.cumsum(taken, 0) - taken
    found += row.to(tl.int64) * 2 * room
    tl.store(found + place, key, taken != 0)
    tl.store(found + room + place, i, taken != 0)


@triton.jit
@no_type_check
def finish_kernel(
    keys, lengths, bound, tally, found, out, capacity, heads, parts, room, budget,
    RUN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The ids of a row."""
    row, some = tl.program_id(0), tl.arange(0, PARTS)
    length = tl.load(lengths + row // heads)
    k = tl.minimum(length, budget)
    tally += row.to(tl.int64) * 2 * parts
    count = tl.sum(tl.load(tally + some, some < parts, other=0), 0)
    above = tl.sum(tl.load(tally + parts + some, some < parts, other=0), 0)
    least, listed = tl.load(bound + row), count <= room
    found += row.to(tl.int64) * 2 * room
    keys += row.to(tl.int64) * capacity
    if listed:
        keys = found
    end, width = tl.where(listed, count, length), tl.where(listed, room, capacity)
    if above >= k:
        least, count = least_of(keys, end, width, k, RUN)
    out += row.to(tl.int64) * budget
    take(keys, found + room, listed, end, width, least, count - k, out, RUN // 2)
    fill(out, k, budget, RUN)


def _build(name: str, kernel: Any, warps: int = 4, **constants: int) -> Build:
    pointers = {"keys", "lengths", "peaks", "bound", "tally", "found", "out"}
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(pointers & arguments.keys(), "*i32")
    signature = arguments | dict.fromkeys(constants, "constexpr")
    return Build(name, kernel, signature, constants, num_warps=warps)


AOT = [
    _build("peaks of 4,096 sets", peaks_kernel, SETS=4096, DEPTH=DEPTH, WIDTH=WIDTH),
    _build("bound of 4,096 sets", bound_kernel, WARPS, SETS=4096, RUN=4096),
    _build("bound of 16,384 sets", bound_kernel, WARPS, SETS=16384, RUN=RUN),
    _build("tally", tally_kernel, 8, PART=PART),
    _build("gather of 256 parts", gather_kernel, WARPS, PART=PART, PARTS=256),
    _build("finish with 256 parts", finish_kernel, WARPS, RUN=RUN, PARTS=256),
]
