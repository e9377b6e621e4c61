"""The slowest tier: what other machines have."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey, KVBlock
from kvstore.codecs.codec import Codec
from kvstore.codecs.known import RAW
from kvstore.errors import Unreachable
from kvstore.passage import staying
from kvstore.remote.breaker import Breaker
from kvstore.remote.config import RemoteConfig
from kvstore.remote.flights import Flights
from kvstore.remote.guarded import Guarded
from kvstore.remote.index import Index
from kvstore.remote.parts import Part, parts_of
from kvstore.remote.reader import Reader
from kvstore.remote.redis_backend import RedisBackend
from kvstore.remote.seal import Seals
from kvstore.remote.sender import Sender, is_sendable
from kvstore.remote.write_behind import WriteBehind
from kvstore.stats import RemoteStats, TierStats
from kvstore.tier import Item, check_layers, checked_out

CLOSE_S = 5.0  # longest wait for what is still to be sent


@runtime_checkable
class Keeper(Protocol):
    """Whoever keeps in this machine what came from elsewhere.

    room: bytes of a tenant that it may keep now; less than a block takes if it cannot.
    empty: memory for a block that comes.
    find: a block that it has by now.
    carrying: what must not be kept, as it is being deleted, until all is done in this context.
    keep: blocks, parents first; as far as there is room.
    """

    def room(self, tenant: bytes) -> int: ...
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...
    def find(self, digest: bytes) -> KVBlock | None: ...
    def carrying(self) -> AbstractContextManager[frozenset[bytes]]: ...
    def keep(self, blocks: Sequence[Item]) -> None: ...


@dataclass(frozen=True, slots=True)
class Alone:
    """Nobody keeps anything: layers are read as they are needed, each time."""

    def room(self, tenant: bytes) -> int:
        return 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(torch.Size(shape), dtype=dtype)

    def find(self, digest: bytes) -> KVBlock | None:
        return None

    def carrying(self) -> AbstractContextManager[frozenset[bytes]]:
        return nullcontext(frozenset())

    def keep(self, blocks: Sequence[Item]) -> None:
        raise AssertionError("there was no room")


class RemoteTier:
    """Blocks on a server, shared with whoever knows the secret. Thread-safe.

    No `Tier`: the server decides what stays (its maxmemory, and a time to live), so there is no
    budget, no policy and nothing to pin; a block may go at any time, which is a miss. A server
    that is down, hung or lying costs a miss too, and at most the time-outs of one exchange.

    A block is records of about 2 MiB, and an index that is written after them, so others see all
    of it or nothing. Index and records are sealed for their block and tenant.

    With a `keeper`, blocks go there that were read; they are read whole then, by one thread only.
    """

    name = "remote"

    def __init__(
        self,
        config: RemoteConfig,
        codec: Codec = RAW,
        *,
        secret: bytes | None = None,
    ) -> None:
        changed = threading.Condition()
        self._seals = Seals(secret or config.secret(), config.namespace)
        backend = RedisBackend(config)
        self._breaker = Breaker(str(backend), config.retry_s, changed)
        self._guarded = Guarded(
            backend, self._breaker, lambda bad: self._writer.discard([bad]),
            name=self._seals.index_name(bytes(32)),
        )  # fmt: skip
        self._reader = Reader(self._guarded, self._seals)
        self._sender = Sender(self._guarded, self._seals, codec, self._count_writes)
        self._flights = Flights()
        self.keeper: Keeper = Alone()
        self.stats = TierStats()  # what reads and lookups count, the store does
        self._lock = threading.Lock()  # guards the numbers
        self._writer = WriteBehind(self._sender, self._breaker, changed, config.queue_bytes)
        with changed:  # the first probe: settings that work do so from the first lookup on
            limit_s = config.connect_timeout_s + config.timeout_s
            changed.wait_for(lambda: not self._breaker.is_open or self._breaker.failures, limit_s)

    @property
    def tier(self) -> "RemoteTier":
        """Itself, as it has no policy: see `Level.tier`."""
        return self

    def held(
        self,
        keys: Sequence[BlockKey],
        besides: Sequence[bool],
        known: Mapping[bytes, bool] | None = None,
    ) -> list[bool]:
        """Which keys the server has of those that are not held `besides`: one exchange or none.

        Args:
            known: what it said before, by digests, which is believed.
        """
        open_, known = zip(keys, besides, strict=True), known or {}
        bad = self._guarded.is_bad  # before as after: one may be deleted, and trusted, meanwhile
        asked = [k for k, there in open_ if k.seal_key and not there and not bad(k.digest)]
        good = {key.digest for key in asked if known.get(key.digest)}
        asked = [key for key in asked if key.digest not in known]
        names = [self._seals.index_name(key.digest) for key in asked]
        found = self._guarded.ask(lambda backend: backend.exists_many(names)) if names else None
        for key, there in zip(asked, found or [], strict=found is not None):
            if there and not bad(key.digest):
                good.add(key.digest)
        return [key.digest in good for key in keys]

    def get(self, key: BlockKey) -> KVBlock | None:
        """A whole block. Do not write to it."""
        if (block := self._pulled([key]).get(key.digest)) is None:
            block = self._fetch([key], None).get(key.digest)
        return block

    def read(
        self, key: BlockKey, layers: range, out: Float[Tensor, "n 2 Hk P D"] | None = None
    ) -> Float[Tensor, "n 2 Hk P D"] | None:
        """As Tier.read."""
        block = self.get(key)
        if block is None:
            return None
        check_layers(layers, len(block.data))
        data = block.data[layers.start : layers.stop]
        return data if out is None else checked_out(out, data.shape, data.dtype).copy_(data)

    def read_many(
        self, keys: Sequence[BlockKey], layers: range, rows: Sequence[Float[Tensor, "n 2 Hk P D"]]
    ) -> list[bool]:
        """Which keys are there: KV of a run of layers of each is then in its row."""
        whole = self._pulled(keys)
        found = [key.digest in whole for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if block := whole.get(key.digest):
                check_layers(layers, len(block.data))
                data = block.data[layers.start : layers.stop]
                checked_out(row, data.shape, data.dtype).copy_(data)
        left = [i for i, is_there in enumerate(found) if not is_there]
        direct = self._direct([keys[i] for i in left], layers, [rows[i] for i in left])
        for i, is_there in zip(left, direct, strict=True):
            found[i] = is_there
        return found

    def offer(self, blocks: Sequence[Item]) -> None:
        """Send blocks some time, parents first, as far as there is room for them to wait."""
        good = [item for item in blocks if is_sendable(item)]
        left_out = self._writer.offer(good) + len(blocks) - len(good)
        self._count_writes(0, left_out)

    def delete(self, keys: Sequence[BlockKey | bytes]) -> int:
        """Delete blocks there, and what waits to be sent of them; how many there were.

        What rests on them stays, if it is not given, until its time is over: nothing can reach it.

        Raises:
            Unreachable: the server may have them still.
        """
        digests = [key if isinstance(key, bytes) else key.digest for key in keys]
        self._writer.forget(frozenset(digests))
        deleted = self._guarded.ask(lambda _: self._sender.delete(digests)) if digests else 0
        if deleted is None:
            raise Unreachable(
                f"{len(digests)} blocks could not be deleted at {self._guarded.backend}, which "
                "does not answer: delete them again, or wait until they expire (remote.ttl_s)"
            )
        return deleted

    def drain(self, timeout_s: float) -> bool:
        """Whether all that was offered is sent or given up, within a time."""
        return self._writer.drain(timeout_s)

    def snapshot(self) -> TierStats:
        with self._lock:
            return replace(self.stats, corrupt=self._guarded.corrupt, quarantined=self._guarded.bad)

    def health(self) -> RemoteStats:
        breaker = self._breaker
        return RemoteStats(
            breaker.is_open, breaker.openings, breaker.failures, breaker.time_outs,
            self._writer.queued_bytes,
        )  # fmt: skip

    def close(self) -> None:
        """Send what waits, for at most `CLOSE_S`, and go."""
        self._count_writes(0, self._writer.close(CLOSE_S))
        self._reader.close()
        self._guarded.backend.close()

    def _pulled(self, keys: Sequence[BlockKey]) -> dict[bytes, KVBlock]:
        """Whole blocks, as many of the leading ones as the keeper has room for, which it then has.

        One of several threads that want a block fetches it for all.
        """
        room = self.keeper.room(keys[0].tenant) if keys else 0
        if room <= 0:
            return {}
        mine, others = self._flights.claim(keys)
        blocks: dict[bytes, KVBlock] = {}
        try:  # what another thread brought a moment ago is there
            blocks = {k.digest: b for k in mine if (b := self.keeper.find(k.digest)) is not None}
            with self.keeper.carrying() as going:
                fresh = self._fetch([key for key in mine if key.digest not in blocks], room)
                blocks |= fresh
                came = [(key, fresh[key.digest]) for key in mine if key.digest in fresh]
                self.keeper.keep(staying(came, going))
        finally:
            self._flights.land(mine, blocks)
        landed = {digest: flight.result() for digest, flight in others.items()}
        return blocks | {digest: block for digest, block in landed.items() if block is not None}

    def _fetch(self, keys: Sequence[BlockKey], room: int | None) -> dict[bytes, KVBlock]:
        """Whole blocks, from the first on as far as `room` bytes go."""
        made: dict[bytes, KVBlock] = {}
        parts: list[Part] = []
        for key, index in zip(keys, self._indexes(keys), strict=True):
            if index is None:
                continue
            if room is not None and (room := room - index.nbytes) < 0:
                break
            with torch.inference_mode(False):  # other threads fill it, and others use it
                data = self.keeper.empty(index.shape, index.dtype)
            made[key.digest] = KVBlock(data)
            parts += parts_of(key, index, range(len(data)), data)
        there = self._reader.load(parts)
        return {digest: block for digest, block in made.items() if digest in there}

    def _direct(
        self, keys: Sequence[BlockKey], layers: range, rows: Sequence[Float[Tensor, "n 2 Hk P D"]]
    ) -> list[bool]:
        """Just the layers of blocks, into rows."""
        parts: list[Part] = []
        for key, index, row in zip(keys, self._indexes(keys), rows, strict=True):
            if index is not None:
                check_layers(layers, index.shape[0])
                checked_out(row, torch.Size((len(layers), *index.shape[1:])), index.dtype)
                parts += parts_of(key, index, layers, row)
        there = self._reader.load(parts)
        return [key.digest in there for key in keys]

    def _indexes(self, keys: Sequence[BlockKey]) -> list[Index | None]:
        good = [key for key in keys if key.seal_key and not self._guarded.is_bad(key.digest)]
        known = dict(zip(good, self._reader.indexes(good), strict=True))
        return [known.get(key) for key in keys]

    def _count_writes(self, nbytes: int, skipped: int) -> None:
        with self._lock:
            self.stats.bytes_written += nbytes
            self.stats.skipped += skipped
