"""What a store of tiers does with requests, said with the simulator's insertion."""

from typing import NamedTuple

from evals.traces.replay import Cache, insert


class Room(NamedTuple):
    cache: Cache
    durable: bool

    @property
    def policy(self):
        return self.cache.policy


def replay_tiers(chains, rooms):
    """Hits of each request: its leading blocks that are in some tier. What it lacks goes to all."""
    return [_serve(chain, rooms) for chain in chains]


def _serve(chain, rooms):
    there = [any(block in room.policy for room in rooms) for block in chain]
    hits = [*there, False].index(False)
    for room in rooms:
        room.policy.touch([block for block in chain[:hits] if block in room.policy])
    for room in sorted(rooms, key=lambda room: room.durable):
        if hits == len(chain):
            break  # nothing is put
        first = hits
        if room.durable:  # and what it lacks of the hits, which rests in memory
            first = min((i for i in range(hits) if chain[i] not in room.policy), default=hits)
        placed = list(zip(chain, [None, *chain], range(len(chain))))[first:]
        absent = [x for x in placed if x[0] not in room.policy]
        insert(room.cache, absent, chain, below=set(chain[:hits]))
    return hits
