"""The store's hits are those of the simulator."""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

import pytest

from evals.traces.read import trace
from evals.traces.replay import replay
from kvstore.admission import AdmissionName
from kvstore.eviction import POLICIES
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.data import real_data
from tests.evals.traces.stored import BLOCK, both, both_of_file, long_names, served

RECORDED = {  # at least so many hits, of 14,162 and 78,544 blocks
    "mooncake_conversation.jsonl": 900,
    "agentic_sessions_512tok.jsonl.gz": 35_000,
}


def talks(count):
    """Conversations that go on, some from an earlier turn, behind one shared block."""
    rng, chains, fresh = random.Random(5), [], 1
    for _ in range(count):
        chain = [0]
        if chains and rng.random() < 0.7:
            chain = rng.choice(chains[-12:])
            chain = chain[: rng.randint(1, len(chain))]
        grown = rng.randint(1, 6)
        chains.append([*chain, *range(fresh, fresh + grown)])
        fresh += grown
    return trace("talks", chains)


@pytest.mark.parametrize("policy", POLICIES)
def test_three_tiers_hit_what_the_simulator_says(policy):
    hits, simulated = both(talks(40), (5, 12, 30), policy)
    assert hits == simulated
    assert sum(hits) > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_seen_again_comes_to_the_disk_as_the_simulator_says(policy):
    hits, simulated = both(talks(40), (5, 12, 30), policy, "second-sight")
    assert hits == simulated
    assert sum(hits) > 60


@pytest.mark.parametrize("policy", POLICIES)
def test_one_tier_hits_what_the_simulator_says(policy):
    chains = long_names(talks(200).chains)
    with TieredStore([HostTier(25 * BLOCK.nbytes)], policy=policy) as store:
        hits = served(store, chains)
    assert hits == replay(chains, POLICIES[policy](), 25)
    assert sum(hits) > 150


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admission", get_args(AdmissionName))
def test_500_recorded_requests_hit_what_the_simulator_says(policy, admission):
    spawned = multiprocessing.get_context("spawn")  # without checks of types, which take 10 times
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        for file, least in RECORDED.items():
            path = real_data(f"traces/{file}")
            hits, simulated = pool.submit(both_of_file, path, 500, policy, admission).result()
            assert hits == simulated
            assert sum(hits) > least
