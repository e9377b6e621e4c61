"""Tiers stacked fast to slow under one policy: the store that the engine uses."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.admission import AdmissionName
from kvstore.allowance import Allowance
from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.known import exact_codec
from kvstore.config import StoreConfig
from kvstore.disk.audit import AuditReport
from kvstore.disk.tier import DiskTier
from kvstore.disk.writer import BATCH_BYTES, QUEUE_BYTES, batches
from kvstore.eviction import PolicyName
from kvstore.gate import Gate, while_open
from kvstore.level import Level
from kvstore.moves import Moves
from kvstore.passage import Passage
from kvstore.pins import PIN_S, Pin, Pins
from kvstore.quotas import Quotas
from kvstore.remote.tier import RemoteTier
from kvstore.sources import Shared, Sources
from kvstore.stats import StoreStats
from kvstore.summary import Ages, ages
from kvstore.tier import HostTier, Item, Resident, Tier, resting_on


class TieredStore:
    """Blocks of KV in tiers, fastest first. Thread-safe; one per folder and process.

    Once it is closed, every call raises StoreError; closing waits for those that are under way.

    A put goes to tiers in memory at once and to durable ones by a background thread. Nothing moves
    on a read, but from `remote`: where there is a tier in memory, what that has alone is then kept
    there and on disk. Any doubt about stored bytes is a miss. Pins hold in this process only, and
    not in `remote`.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        queue_bytes: int = QUEUE_BYTES,
        write_bytes_per_s: int | None = None,
        policy: PolicyName = "lru",
        remote: RemoteTier | None = None,
        quotas: Quotas | None = None,
        admission: AdmissionName = "always",
    ) -> None:
        self._lock = threading.RLock()  # policies, pins and numbers; never held during I/O
        self._pins = Pins(self._lock)
        self._quotas = Quotas() if quotas is None else quotas
        self._levels = [
            Level(tier, self._lock, self._pins, policy, self._quotas, admission) for tier in tiers
        ]
        pace = Allowance(float(write_bytes_per_s), BATCH_BYTES) if write_bytes_per_s else None
        self._passage = Passage()
        self._moves = Moves(self._levels, self._pins, self._passage, queue_bytes, pace)
        self._writer = self._moves.writer
        self._remote = remote
        if remote is not None:
            remote.keeper = self._moves
        self._sources = Sources(self._levels, remote, self._lock)
        self.gate = Gate("the store")
        self._closing, self._closed = threading.Lock(), False

    @classmethod
    def open(cls, config: StoreConfig) -> "TieredStore":
        """The tiers that the configuration asks for. Raises StoreError."""
        codec, tiers = exact_codec(config.codec), list[Tier]()
        with ExitStack() as opened:
            remote = None if config.remote is None else RemoteTier(config.remote, codec)
            if remote is not None:
                opened.callback(remote.close)
            if config.host_bytes:
                tiers.append(HostTier(config.host_bytes))
            if config.disk_path is not None:
                tiers.append(DiskTier(Path(config.disk_path), config.disk_bytes, codec))
                opened.callback(tiers[-1].close)
            store = cls(
                tiers, policy=config.policy, remote=remote, quotas=config.quotas(),
                admission=config.admission, write_bytes_per_s=config.disk_write_bytes_per_s,
            )  # fmt: skip
            opened.pop_all()
        return store

    @while_open
    def lookup(self, keys: Sequence[BlockKey], shared: Shared = None) -> int:
        """How many leading keys are in some tier. Counts as a use of them; moves no data.

        Args:
            shared: what the shared tier has, as `shared` told; it is asked for all others now.
        """
        return self._sources.lookup(keys, shared)

    @property
    def is_shared(self) -> bool:
        """Whether there is a shared tier."""
        return self._remote is not None

    @while_open
    def shared(self, keys: Sequence[BlockKey]) -> dict[bytes, bool]:
        """Of the leading keys that are not in this machine, by digest, whether the shared tier has
        them: for a `lookup` to come that must not wait for its server. No use of any block.
        """
        return self._sources.shared(keys)

    @while_open
    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        """KV of a run of layers, from the fastest tier that has it. Do not write to it.

        With `out` it is copied there: memory that is used again spares the page faults of a
        fresh tensor, which take as long as the copy.
        """
        return self._sources.read(key, layers, out)

    @while_open
    def get(self, key: BlockKey) -> KVBlock | None:
        """A whole block, from the fastest tier that has it. Do not write to it."""
        return self._sources.get(key)

    @while_open
    def read_many(
        self, keys: Sequence[BlockKey], layers: range, out: Float[Tensor, "B n 2 Hk P D"]
    ) -> list[bool]:
        """Which keys are there: KV of a run of layers of these blocks is then in rows of `out`.

        Faster than reads one by one: a thread looks several blocks up before it copies them, and
        some threads do so at a time. A row of an absent block is undefined.
        """
        return self._sources.read_many(keys, layers, out)

    @while_open
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a block that will be put here: much faster to fill than the system's."""
        return self._moves.spares.empty(shape, dtype)

    @while_open
    def put(self, blocks: Sequence[Item]) -> None:
        """Store blocks, parents first. They belong to the store afterwards: do not write to them.

        Present ones are left alone. Blocks that do not fit beside pinned ones are skipped and
        counted. Waits while too much is queued for the disk; with `write_bytes_per_s`, blocks
        that do not fit the queue are skipped instead.

        Raises:
            TierFull: for a block larger than a whole tier; then nothing was stored.
        """
        for level in self._levels:
            level.check_fits(blocks)
        for batch in batches(blocks):  # what makes room for one leaves its memory to the next
            owned = [(key, self._moves.spares.owned(block)) for key, block in batch]
            reachable = self._reachable(owned)
            for level in self._moves.fast:
                level.insert(reachable)
                level.skip(len(owned) - len(reachable))
            if self._remote is not None:
                self._remote.offer(owned)
            if self._writer is not None:
                left_out = self._writer.put(owned)
                for level in self._moves.slow:
                    level.skip(left_out)

    @while_open
    def flush(self) -> None:
        """Return when all that was put is durable or skipped. Raises the StoreError of a write.

        A remote tier is not waited for: it promises nothing.
        """
        if self._writer is not None:
            self._writer.flush()

    @while_open
    def settle(self) -> None:
        """Return when nothing that was put before is on its way to the disk any more.

        What went wrong on the way is for those to hear who flush.
        """
        if self._writer is not None:
            self._writer.settle()

    @while_open
    def pin(self, keys: Sequence[BlockKey], ttl_s: int | float = PIN_S) -> Pin:
        """Keep keys from being evicted. What a lookup finds while they are pinned, stays.

        Until the pin is released (it is a context manager, too), but for `ttl_s` seconds at most:
        a pin that nobody releases must not keep others out for ever.
        """
        return self._pins.pin([key.digest for key in keys], ttl_s)

    @while_open
    def limit(self, tenant: bytes, nbytes: int) -> None:
        """Give a tenant (its tag, see `tenant_tag`) a quota; see `kvstore.quotas`."""
        with self._lock:
            divided = bool(self._quotas)
            self._quotas.set(tenant, nbytes)
        if not divided:
            for level in self._levels:
                level.divide()

    @while_open
    def promote(self, keys: Sequence[BlockKey]) -> int:
        """Copy leading keys into the fastest tier as far as it has room; how many it then has.

        They were of use: what a tier that takes in what is seen twice lacks of them, is offered it.
        """
        with self.pin(keys):
            return self._moves.bring(keys, self._sources.get)

    @while_open
    def audit(self, repair: bool = False) -> AuditReport:
        """Verify every record and the books of every tier; `repair` deletes what is bad."""
        report = AuditReport()
        for level in self._levels:
            report += level.audit(repair)
        return report

    @while_open
    def stats(self) -> StoreStats:
        queued = self._writer.queued_bytes if self._writer else 0
        tiers = {level.tier.name: level.snapshot() for level in self._levels}
        remote = self._remote
        if remote is not None:
            tiers[remote.name] = remote.snapshot()
        return StoreStats(
            tiers, queued, len(self._pins), self._pins.oldest_s, self._pins.expired,
            None if remote is None else remote.health(),
        )  # fmt: skip

    @while_open
    def ages(self) -> Ages | None:
        """How long ago blocks on disk were used; None without any."""
        disks = [level.tier for level in self._levels if isinstance(level.tier, DiskTier)]
        return ages(disks[0]) if disks else None

    @while_open
    def __contains__(self, key: BlockKey | bytes) -> bool:
        """Whether some tier of this machine has a block; counts as no use of it."""
        return any(key in level.tier for level in self._levels)

    @while_open
    def resting(self, keys: Sequence[BlockKey], shared: Shared = None) -> list[str | None]:
        """The fastest tier that has each of the keys, as `lookup`; counts as no use of it."""
        return self._sources.resting(keys, shared)

    @while_open
    def delete(self, keys: Sequence[BlockKey | bytes]) -> int:
        """Delete blocks (or digests) from every tier, pinned or not; how many copies there were.

        What rests on them goes, too; of a server, what of that is here. A request that is reading
        one computes it instead. Memory of other processes is theirs: what they hold goes when they
        end or evict it.

        Raises:
            StoreError: the device failed.
        """
        digests = [key if isinstance(key, bytes) else key.digest for key in keys]
        self.settle()
        with self._passage.deleting(digests):
            self.settle()  # what others had put on its way by then
            try:  # first, or a reader would bring back from there what is gone here
                count = 0 if self._remote is None else self._delete_there(self._remote, digests)
            finally:
                here = self._delete_here(digests)
        return count + here

    @while_open
    def clear(self) -> None:
        """Delete all blocks of this machine, also those of other tenants and models."""
        self.settle()
        with self._passage.deleting([each.digest for each in self._residents()]):
            self.settle()  # what others had put on its way by then
            for level in self._levels:
                level.clear()

    def close(self) -> None:
        """Write what is queued and close the tiers. Raises the StoreError of a write.

        A forked child only lets go of the folder: it lacks the threads, and what they had locked
        at that moment stays locked. It cannot open a folder again that was in use then.
        """
        if self.gate.is_left_behind:
            for tier in (level.tier for level in self._levels):
                if isinstance(tier, DiskTier):
                    tier.access.env.close()
            return
        with self._closing:
            if self._closed:
                return
            if self._writer is not None:
                self._writer.hurry()
            self.gate.shut()
            self._closed = True
            self._close_all()

    def __enter__(self) -> "TieredStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reachable(self, blocks: Sequence[Item]) -> list[Item]:
        """Those that a lookup could reach: their parent is among them or in some tier."""
        known: set[bytes | None] = {None}
        for key, _ in blocks:
            parent = key.parent
            if parent in known or any(parent in level.tier for level in self._levels):
                known.add(key.digest)
        return [item for item in blocks if item[0].digest in known]

    def _delete_there(self, remote: RemoteTier, digests: Sequence[bytes]) -> int:
        """Of a server, also what rests on them as far as it is here: a server does not know."""
        count, known = remote.delete(digests), resting_on(digests, self._residents())
        remote.delete(known[len(set(digests)) :])
        return count

    def _delete_here(self, digests: Sequence[bytes]) -> int:
        rest = resting_on(digests, self._residents())
        with self._passage.deleting(rest):
            return sum(level.delete(digests, rest) for level in self._levels)

    def _residents(self) -> Iterator[Resident]:
        return chain.from_iterable(level.tier.residents() for level in self._levels)

    def _close_all(self) -> None:
        with ExitStack() as closing:  # all of them, whatever goes wrong with one; the last first
            closing.callback(self._moves.spares.close)
            if self._remote is not None:
                closing.callback(self._remote.close)
            for level in reversed(self._levels):
                closing.callback(level.tier.close)
            closing.callback(self._sources.close)
            if self._writer is not None:
                self._writer.close()
