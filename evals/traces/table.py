"""Hit rates of policies at capacities, beside the most that any policy can have."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from evals.traces.read import RequestTrace
from evals.traces.replay import named, optimum, replay, reuses
from kvstore.eviction import FIFO, LRU, EvictionPolicy

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "fifo": FIFO}
OPTIMUM = "belady"


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Hits of a policy with room for so many blocks.

    Args:
        capacity: blocks; None for room for all.
        hit_rate: share of all blocks of all requests.
        hit_rate_unshared: the same without the leading blocks that all requests have in common;
            None where there are no others.
    """

    policy: str
    capacity: int | None
    hits: int
    hit_rate: float
    hit_rate_unshared: float | None


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, and what came of its replays.

    Args:
        distinct: different blocks.
        shared: leading blocks that all requests have in common.
    """

    trace: str
    requests: int
    blocks: int
    distinct: int
    shared: int
    rates: list[Rate]


def measure(trace: RequestTrace, policies: Sequence[str], capacities: Sequence[int]) -> Rates:
    """Every policy at every capacity, Belady's optimum last; without a limit it stands for all.

    Args:
        policies: of `POLICIES`.
        capacities: in blocks.
    Raises:
        ConfigError: a policy that there is not, or a capacity below 1.
    """
    _check(policies, capacities)
    return Rates(
        trace=trace.name,
        requests=len(trace.chains),
        blocks=trace.blocks,
        distinct=trace.distinct,
        shared=trace.shared,
        rates=[
            _rate(trace, policy, capacity, hits)
            for policy, capacity, hits in _replays(trace, policies, capacities)
        ],
    )


def _check(policies: Sequence[str], capacities: Sequence[int]) -> None:
    for name in policies:
        if name not in POLICIES:
            raise ConfigError(
                f"there is no policy {name!r}: --policy takes {', '.join(POLICIES)} "
                f"({OPTIMUM} is always shown)"
            )
    if not capacities or min(capacities) < 1:
        raise ConfigError(f"--capacity must be 1 block or more, got {list(capacities)}")


def _replays(
    trace: RequestTrace, policies: Sequence[str], capacities: Sequence[int]
) -> Iterator[tuple[str, int | None, list[int]]]:
    """Policy, capacity, and hits of each request; the policies' in as many processes as cores."""
    cases = list(product(policies, capacities))
    if cases:
        spawned = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
        with ProcessPoolExecutor(mp_context=spawned) as pool:
            found = [pool.submit(_replayed, trace.chains, *case) for case in cases]
            for case, hits in zip(cases, found, strict=True):
                yield *case, hits.result()
    reused = reuses(trace.chains, trace.distinct)
    for capacity in capacities:
        yield OPTIMUM, capacity, optimum(reused, capacity)
    yield OPTIMUM, None, optimum(reused, trace.distinct)


def _replayed(chains: Sequence[NDArray[np.int32]], policy: str, capacity: int) -> list[int]:
    return replay(named(chains), POLICIES[policy](), capacity)


def _rate(trace: RequestTrace, policy: str, capacity: int | None, hits: list[int]) -> Rate:
    blocks, shared, found = trace.blocks, trace.shared, sum(hits)
    unshared = blocks - shared * len(hits)
    found_unshared = sum(max(0, x - shared) for x in hits)
    return Rate(
        policy=policy,
        capacity=capacity,
        hits=found,
        hit_rate=found / blocks,
        hit_rate_unshared=found_unshared / unshared if unshared else None,
    )


def by_policy(rates: Rates) -> Mapping[str, list[Rate]]:
    """Rates in rows."""
    names = dict.fromkeys(rate.policy for rate in rates.rates)
    return {name: [rate for rate in rates.rates if rate.policy == name] for name in names}
