"""The store itself, replaying requests beside the simulator."""

import tempfile
from pathlib import Path

import torch

from evals.traces.read import read_traces
from evals.traces.replay import Cache, named
from kvstore.admission import SecondSight
from kvstore.block import BlockKey, Kind, KVBlock
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.eviction import POLICIES
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.evals.traces.tiers import Room, replay_tiers

BLOCK = KVBlock(torch.zeros(1, 2, 1, 1, 1))
COST = entry_cost(BLOCK.data)


def long_names(chains):
    return [[name.rjust(32, b"\0") for name in chain] for chain in named(chains)]


def served(store, chains):
    """Hits of each request, with what an engine does with a prompt."""
    made, hits = {}, []
    for chain in chains:
        for depth, (name, parent) in enumerate(zip(chain, [None, *chain])):
            if name not in made:
                made[name] = BlockKey(name, parent, bytes(32), bytes(16), 1, Kind.EXACT, depth)
        keys = [made[name] for name in chain]
        with store.pin(keys):
            hits.append(store.lookup(keys))
            store.put([(key, BLOCK) for key in keys[hits[-1] :]])
            store.flush()
    return hits


def both(made, capacities, policy, admission="always"):
    """Hits of each request in two tiers in memory and one on disk: the store's, the simulator's."""
    chains = long_names(made.chains)
    sizes = BLOCK.nbytes, BLOCK.nbytes, COST
    rooms = [
        Room(Cache(POLICIES[policy](), capacity, nbytes), nbytes == COST)
        for capacity, nbytes in zip(capacities, sizes)
    ]
    if admission == "second-sight":
        rooms[-1].cache.admission = SecondSight(capacities[-1] * COST)
    small, large, disk = (count * nbytes for count, nbytes in zip(capacities, sizes))
    with tempfile.TemporaryDirectory() as folder:
        tiers = [HostTier(small), HostTier(large), DiskTier(Path(folder, "store"), disk)]
        with TieredStore(tiers, policy=policy, admission=admission) as store:
            hits, simulated = served(store, chains), replay_tiers(chains, rooms)
            assert store.audit().clean
            assert all(level.stats.evictions for level in store._levels)
            for room, level in zip(rooms, store._levels):
                assert set(level._ranks) == set(room.policy)
            written = store.stats().tiers["disk"].bytes_written // BLOCK.nbytes
            assert written == rooms[-1].cache.stored
    return hits, simulated


def both_of_file(path, count, policy, admission="always"):
    """As `both`, of the first requests of a recorded trace, in small tiers."""
    made = read_traces(path, count)[0]
    disk = made.distinct // 3
    return both(made, (disk // 9, disk // 3, disk), policy, admission)
