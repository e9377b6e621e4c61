"""Hit rates of policies at capacities, beside the most that any policy can have."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from evals.traces.read import RequestTrace
from evals.traces.replay import Cache, named, optimum, reuses, served
from kvstore.admission import AdmissionName, SecondSight
from kvstore.eviction import POLICIES, PolicyName

OPTIMUM = "belady"
Chains: TypeAlias = Sequence[NDArray[np.int32]]
Case: TypeAlias = tuple[PolicyName, int, AdmissionName]
Replayed: TypeAlias = tuple[str, int, list[int], int]


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Hits of a policy with room for so many blocks.

    Args:
        capacity: blocks; None for room for all.
        hit_rate: share of all blocks of all requests.
        hit_rate_unshared: the same without the leading blocks that all requests have in common;
            None where there are no others.
        stored: blocks written, the same one perhaps several times; None for the optimum.
    """

    policy: str
    capacity: int | None
    hits: int
    hit_rate: float
    hit_rate_unshared: float | None
    stored: int | None = None


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, and what came of its replays.

    Args:
        distinct: different blocks.
        shared: leading blocks that all requests have in common.
        admission: what came in under the policies; the optimum stores what it likes.
    """

    trace: str
    admission: AdmissionName
    requests: int
    blocks: int
    distinct: int
    shared: int
    rates: list[Rate]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One replay: its hit rates, and how many blocks the requests asked for, the shared included.

    Args:
        hit_rate_without_shared: None where requests have no block that not all have.
    """

    hit_rate: float
    hit_rate_without_shared: float | None
    accesses: int


def measure(
    trace: RequestTrace,
    policies: Sequence[str],
    capacities: Sequence[int],
    admission: AdmissionName = "always",
) -> Rates:
    """Every policy at every capacity, Belady's optimum last; without a limit it stands for all.

    Args:
        policies: of `POLICIES`, or the optimum.
        capacities: in blocks.
    Raises:
        ConfigError: a policy that there is not, or a capacity below 1.
    """
    known = _checked(policies, capacities)
    return Rates(
        trace=trace.name,
        admission=admission,
        requests=len(trace.chains),
        blocks=trace.blocks,
        distinct=trace.distinct,
        shared=trace.shared,
        rates=[
            _rate(trace, policy, capacity, hits, stored)
            for policy, capacity, hits, stored in _replays(trace, known, capacities, admission)
        ],
    )


def _checked(policies: Sequence[str], capacities: Sequence[int]) -> list[PolicyName]:
    """The policies that are simulated: all but the optimum."""
    for name in policies:
        if name not in (*POLICIES, OPTIMUM):
            raise ConfigError(
                f"there is no policy {name!r}: --policy takes {', '.join(POLICIES)}, {OPTIMUM}"
            )
    if not capacities or min(capacities) < 1:
        raise ConfigError(f"--capacity must be 1 block or more, got {list(capacities)}")
    return [name for name in POLICIES if name in policies]


def _replays(
    trace: RequestTrace,
    policies: Sequence[PolicyName],
    capacities: Sequence[int],
    admission: AdmissionName,
) -> Iterator[tuple[str, int | None, list[int], int | None]]:
    """Policy, capacity, hits of each request, and blocks stored; in as many processes as cores."""
    yield from _simulated(trace.chains, list(product(policies, capacities, [admission])))
    reused = reuses(trace.chains, trace.distinct)
    for capacity in capacities:
        yield OPTIMUM, capacity, optimum(reused, capacity), None
    yield OPTIMUM, None, optimum(reused, trace.distinct), None


def _simulated(chains: Chains, cases: Sequence[Case]) -> Iterator[Replayed]:
    """Cases in their order. Each process takes some of them: to name the blocks takes a while."""
    count = min(len(cases), os.cpu_count() or 1)
    if count < 2:
        yield from _replayed(chains, cases)
        return
    spawned = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    with ProcessPoolExecutor(count, mp_context=spawned) as pool:
        parts = [pool.submit(_replayed, chains, cases[i::count]) for i in range(count)]
        for i in range(len(cases)):
            yield parts[i % count].result()[i // count]


def _replayed(chains: Chains, cases: Sequence[Case]) -> list[Replayed]:
    requests = named(chains) if cases else []
    return [_one(requests, case) for case in cases]


def _one(requests: Sequence[list[bytes]], case: Case) -> Replayed:
    name, size, admission = case
    choosy = SecondSight(size) if admission == "second-sight" else None
    cache = Cache(POLICIES[name](), size, admission=choosy)
    return name, size, served(requests, cache), cache.stored


def _rate(
    trace: RequestTrace, policy: str, capacity: int | None, hits: list[int], stored: int | None
) -> Rate:
    blocks, shared, found = trace.blocks, trace.shared, sum(hits)
    unshared = blocks - shared * len(hits)
    found_unshared = sum(max(0, x - shared) for x in hits)
    return Rate(
        policy=policy,
        capacity=capacity,
        hits=found,
        hit_rate=found / blocks,
        hit_rate_unshared=found_unshared / unshared if unshared else None,
        stored=stored,
    )


def outcome(rates: Rates, policy: str) -> Outcome:
    """Of a policy at the first of its capacities."""
    rate = by_policy(rates)[policy][0]
    return Outcome(
        hit_rate=rate.hit_rate,
        hit_rate_without_shared=rate.hit_rate_unshared,
        accesses=rates.blocks,
    )


def by_policy(rates: Rates) -> Mapping[str, list[Rate]]:
    """Rates in rows."""
    names = dict.fromkeys(rate.policy for rate in rates.rates)
    return {name: [rate for rate in rates.rates if rate.policy == name] for name in names}
