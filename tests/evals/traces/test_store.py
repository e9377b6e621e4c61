"""The store itself, replaying requests: its hits are those of the simulator."""

import random

import pytest
import torch

from evals.traces.read import read_traces, trace
from evals.traces.replay import named, replay
from kvstore.block import BlockKey, Kind, KVBlock
from kvstore.disk import DiskTier
from kvstore.eviction import POLICIES
from kvstore.ledger import entry_cost
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.data import real_data
from tests.evals.traces.tiers import Room, replay_tiers

BLOCK = KVBlock(torch.zeros(1, 2, 1, 1, 1))
COST = entry_cost(BLOCK.data)
RECORDED = "mooncake_conversation.jsonl", "agentic_sessions_512tok.jsonl.gz"


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


def keys_of(chain):
    """Keys with the simulator's names, so that what is undecided is decided alike."""
    parents = [None, *chain[:-1]]
    return [
        BlockKey(name, parent, bytes(32), bytes(16), 1, Kind.EXACT, depth)
        for depth, (name, parent) in enumerate(zip(chain, parents))
    ]


def long_names(chains):
    return [[name.rjust(32, b"\0") for name in chain] for chain in named(chains)]


def serve(store, chain):
    """What an engine does with a prompt; its hits."""
    keys = keys_of(chain)
    with store.pin(keys):
        hits = store.lookup(keys)
        store.put([(key, BLOCK) for key in keys[hits:]])
        store.flush()
    return hits


def check(made, capacities, name, folder):
    """Two tiers in memory and one on disk."""
    chains = long_names(made.chains)
    sizes = BLOCK.nbytes, BLOCK.nbytes, COST
    rooms = [
        Room(POLICIES[name](), capacity, nbytes, nbytes == COST)
        for capacity, nbytes in zip(capacities, sizes)
    ]
    small, large, disk = (c * n for c, n in zip(capacities, sizes))
    tiers = [HostTier(small), HostTier(large), DiskTier(folder, disk)]
    with TieredStore(tiers, policy=name) as store:
        hits = [serve(store, chain) for chain in chains]
        assert hits == replay_tiers(chains, rooms)
        for room, level in zip(rooms, store._levels):
            assert set(level._policy) == set(room.policy)
        assert all(level.stats.evictions for level in store._levels)
        assert store.audit().clean
    return sum(hits)


@pytest.mark.parametrize("name", POLICIES)
def test_three_tiers_hit_what_the_simulator_says(name, tmp_path):
    assert check(talks(60), (5, 12, 30), name, tmp_path / "store") > 80


@pytest.mark.parametrize("name", POLICIES)
def test_one_tier_hits_what_the_simulator_says(name):
    chains = long_names(talks(200).chains)
    with TieredStore([HostTier(25 * BLOCK.nbytes)], policy=name) as store:
        hits = [serve(store, chain) for chain in chains]
    assert hits == replay(chains, POLICIES[name](), 25)
    assert sum(hits) > 150


@pytest.mark.slow
@pytest.mark.parametrize("file", RECORDED)
@pytest.mark.parametrize("name", POLICIES)
def test_recorded_requests_hit_what_the_simulator_says(name, file, tmp_path):
    made = read_traces(real_data(f"traces/{file}"), 500)[0]
    third = made.distinct // 3
    assert check(made, (third // 9, third // 3, third), name, tmp_path / "store") > 500
