"""Numbers that tell how the store is doing."""

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

from kvstore.block import Kind
from kvstore.tally import Groups

Owner: TypeAlias = tuple[bytes, Kind]  # a tenant's tag, and what the blocks are good for


@dataclass(slots=True)
class TierStats:
    """One tier since it was opened. Blocks, unless a name says bytes."""

    used_bytes: int = 0
    capacity_bytes: int = 0
    blocks: int = 0
    hits: int = 0  # found here by a lookup
    misses: int = 0  # looked for here in vain
    reads: int = 0  # reads answered, of a run of layers or a whole block
    bytes_read: int = 0
    bytes_written: int = 0
    evictions: int = 0
    skipped: int = 0  # not stored: no room beside what is pinned, or no parent
    refused: int = 0  # not stored: seen for the first time, and others would have had to go
    corrupt: int = 0
    quarantined: int = 0
    groups: Groups = field(default_factory=dict)  # what is whose
    hits_of: Counter[Owner] = field(default_factory=Counter)
    misses_of: Counter[Owner] = field(default_factory=Counter)


@dataclass(slots=True)
class RemoteStats:
    """How well the server of the shared tier answers, since it was opened."""

    is_open: bool = False  # set aside: nothing is asked until it answers a probe
    openings: int = 0  # times it was set aside
    failures: int = 0  # exchanges and probes
    time_outs: int = 0  # of these
    queued_bytes: int = 0  # waiting to be sent


@dataclass(slots=True)
class StoreStats:
    """All tiers, what waits to be written, and what is pinned."""

    tiers: dict[str, TierStats] = field(default_factory=dict)
    queued_bytes: int = 0
    pinned: int = 0
    oldest_pin_s: float = 0.0  # how long the oldest pin has held
    expired_pins: int = 0  # that were not released in time
    remote: RemoteStats | None = None  # None without a shared tier
    loaded_starts: int = 0  # of prompts, which were stored
    computed_starts: int = 0  # which were stored too, and computed as that is faster
