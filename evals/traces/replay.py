"""Hits of a cache of blocks under a policy of the store, and the most that any policy can have.

A request's hits are its leading blocks that are all there: a block is of use only with all before
it. What a request missed is stored after it, as `kvstore.level` does: victims make room, the
request's own blocks are none of them, and what has no room beside those is not stored, nor what an
admission refuses.
"""

import heapq
from bisect import bisect_left
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore.admission import SecondSight
from kvstore.eviction import EvictionPolicy
from kvstore.tier import Resident


def named(chains: Sequence[NDArray[np.int32]]) -> list[list[bytes]]:
    """Chains with names as the store has them, each one object."""
    count = max(int(chain.max()) for chain in chains) + 1
    names = [number.to_bytes(4, "big") for number in range(count)]
    return [[names[x] for x in chain.tolist()] for chain in chains]


Placed: TypeAlias = tuple[bytes, bytes | None, int]  # a block, its parent, and its depth


@dataclass(slots=True)
class Cache:
    """Room for `capacity` blocks under a policy.

    Args:
        policy: an empty one, of blocks of `nbytes`.
        admission: also decides what comes in; of `capacity * nbytes` bytes.
        stored: blocks, since the beginning.
    """

    policy: EvictionPolicy
    capacity: int
    nbytes: int = 1
    admission: SecondSight | None = None
    stored: int = 0


def replay(chains: Sequence[list[bytes]], policy: EvictionPolicy, capacity: int) -> list[int]:
    """Hits of each request, with room for `capacity` blocks, where all come in."""
    return served(chains, Cache(policy, capacity))


def served(chains: Sequence[list[bytes]], cache: Cache) -> list[int]:
    """Hits of each request in a cache, which is then as they left it."""
    return [_serve(chain, cache) for chain in chains]


def _serve(chain: list[bytes], cache: Cache) -> int:
    policy = cache.policy
    # what is there of a chain is always its beginning
    hits = bisect_left(chain, True, key=lambda block: block not in policy)
    policy.touch(chain[:hits])
    missing = chain[hits:]
    above = [chain[hits - 1] if hits else None, *missing[:-1]]
    insert(cache, list(zip(missing, above, range(hits, len(chain)), strict=False)))
    return hits


def insert(
    cache: Cache,
    blocks: Sequence[Placed],
    pinned: Iterable[bytes] = (),
    below: Container[bytes] = (),
) -> None:
    """Store absent blocks, parents first, as `kvstore.level` does: together, or as many as fit.

    Args:
        pinned: not to be evicted; nor are those on which the new ones rest.
        below: of the new ones, those that come just because others rest on them.
    """
    blocks = _admitted(cache, blocks, below)
    if _fits(cache, blocks, pinned):
        return
    skipped: set[bytes | None] = set()
    for placed in blocks:
        if placed[1] in skipped or not _fits(cache, [placed], pinned):
            skipped.add(placed[0])


def _admitted(cache: Cache, blocks: Sequence[Placed], below: Container[bytes]) -> Sequence[Placed]:
    if cache.admission is None:
        return blocks
    offers = [Resident(block, parent, cache.nbytes, depth, b"") for block, parent, depth in blocks]
    free = (cache.capacity - len(cache.policy)) * cache.nbytes
    chosen = cache.admission.choose(offers, free, {}, cache.policy.__contains__, below)
    return [block for block, comes in zip(blocks, chosen, strict=True) if comes]


def _fits(cache: Cache, blocks: Sequence[Placed], pinned: Iterable[bytes]) -> bool:
    """Store all of the blocks, or none."""
    policy = cache.policy
    if (excess := len(policy) + len(blocks) - cache.capacity) > 0:
        keep = {parent for _, parent, _ in blocks if parent is not None}
        keep.update(pinned)
        victims = list(islice(policy.victims(keep), excess))
        if len(victims) < excess:
            return False
        for block in victims:
            policy.remove(block)
            if cache.admission is not None:
                cache.admission.gone(block, cache.nbytes)
    for block, parent, depth in blocks:
        policy.add(block, parent, cache.nbytes, depth)
    cache.stored += len(blocks)
    return True


class Reuse(NamedTuple):
    """Blocks [first, stop) of a request's chain are next used by another request, all of them."""

    first: int
    stop: int
    request: int


def reuses(chains: Sequence[NDArray[np.int32]], distinct: int) -> list[list[Reuse]]:
    """For each request, which of its blocks are used again, and by which request next."""
    never = len(chains)
    following = np.full(distinct, never, np.int64)
    found: list[list[Reuse]] = []
    for number in range(never - 1, -1, -1):
        chain = chains[number]
        later = following[chain]
        following[chain] = number
        edges = [0, *(np.flatnonzero(np.diff(later)) + 1).tolist(), len(chain)]
        runs = (Reuse(a, b, int(later[a])) for a, b in pairwise(edges))
        found.append([run for run in runs if run.request < never])
    return found[::-1]


def optimum(reused: Sequence[Sequence[Reuse]], capacity: int) -> list[int]:
    """Hits of each request under Belady's rule: the block whose next use is farthest goes.

    That is the most hits that any policy can have, also one that knows the future, evicts what it
    likes, and stores only what it likes. Take the references to blocks one by one, those of a
    request from its head on. Whatever a policy does is a schedule of this sequence, if blocks are
    stored when referred to; and there Belady's rule, which here may pass a new block over too, has
    the most hits (Belady 1966; Mattson et al. 1970), even if a block counted without those before
    it. They are there anyway: who uses a block uses those before it, earlier, so their next use is
    nearer and they stay longer. So the bound is reached, and is that of the prefix rule as well.
    It is not one of a single request's hits, only of their sum.

    Args:
        reused: of `reuses`. What is never used again is not kept.
    """
    kept: dict[int, tuple[int, int]] = {}  # request: which of its blocks wait for it
    farthest: list[int] = []  # these requests, negative, as a heap; some have been served
    size, hits = 0, []
    for number, runs in enumerate(reused):
        first, stop = kept.pop(number, (0, 0))
        hits.append(stop - first)
        size -= stop - first
        for run in runs:
            if run.request not in kept:
                heapq.heappush(farthest, -run.request)
            # deeper blocks that wait for the same request follow at run.stop, if still kept
            kept[run.request] = run.first, kept.get(run.request, (0, run.stop))[1]
            size += run.stop - run.first
        while size > capacity:
            size -= _cut(kept, farthest, size - capacity)
    return hits


def _cut(kept: dict[int, tuple[int, int]], farthest: list[int], excess: int) -> int:
    """Drop up to `excess` blocks of the request that is farthest off, the last ones; how many."""
    request = -farthest[0]
    first, stop = kept[request]
    if stop - first > excess:
        kept[request] = first, stop - excess
        return excess
    del kept[request]
    heapq.heappop(farthest)
    return stop - first
