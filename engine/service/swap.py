"""Moves KV of requests that wait below the device, and back: in few large copies."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from engine.model.pieces import Shape
from engine.service.below import Below, Copies, Segment, SwapStats
from engine.service.slab import SlabCache
from engine.service.swap_file import SwapFile
from kvstore.errors import PoolFull
from kvstore.pool.pinned import lock_pages
from kvstore.pool.spill import Spill
from native.pages import own_pages
from native.threads import use_one_core


class Swap:
    """Moves slabs to host memory, and to disk where that is full (FastSwitch, Shen et al. 2024).

    What was copied stays below while a request runs again, so that moving it down once more copies
    only the tokens that are new. For one thread, at a time when nobody else uses the cache.

    Requests that are out always have room together if their `cost` is within `capacity_bytes`; see
    `Below` for who gives way.

    Args:
        host_bytes: budget of host memory; what passes it on to a `spill` comes in addition.
        spill: closed with this.
    """

    setting = "schedule.swap_bytes"

    def __init__(self, shape: Shape, host_bytes: int, spill: Spill | None = None) -> None:
        self._shape, self._token_bytes = shape, shape.kv_bytes_per_token
        self._file = None if spill is None else SwapFile(shape, spill)
        self._below = Below(host_bytes, self._file)
        self._thread = ThreadPoolExecutor(1, "headrace-swap", use_one_core)

    # what a scheduler may count on

    @property
    def capacity_bytes(self) -> int:
        """What requests that are out may cost together: all of them may have to go to disk."""
        on_disk = 0 if self._file is None else self._file.count * self._file.piece_bytes
        return max(self._below.host_bytes, on_disk)

    @property
    def slack_bytes(self) -> int:
        """Most bytes by which the cost of a request exceeds its KV."""
        return self.cost(1) - self._token_bytes

    def cost(self, tokens: int) -> int:
        """Bytes of the capacity that a request of so many tokens takes."""
        if self._file is None:
            return tokens * self._token_bytes
        return self._file.pieces(tokens) * self._file.piece_bytes

    # what it did

    @property
    def stats(self) -> SwapStats:
        """So far; counts on."""
        return self._below.stats

    @property
    def used_bytes(self) -> int:
        """Of host memory."""
        return self._below.used_bytes

    def check(self) -> None:
        """AssertionError unless all that is kept is accounted for."""
        self._below.check()

    # what it does

    def out(self, cache: SlabCache) -> None:
        """Copy the tokens that have no copy yet, and unload the slab.

        Raises:
            PoolFull: there is no room; the cache is still loaded.
            StoreError: as `Spill.write`; still loaded, too.
        """
        copies = self._below.copies.pop(cache, None) or Copies()
        self._below.copies[cache] = copies
        if cache.length > copies.tokens:
            self._copy(cache, copies)
        self.stats.outs += 1
        cache.unload()

    def back(self, cache: SlabCache) -> "Future[None]":
        """Load a cache that is out, in a thread; those asked for first come first.

        Until the future is done nobody may use the cache. It raises CorruptRecord, or another
        StoreError, if KV is lost: then the cache stays out, and can only be forgotten.
        """
        copies, slab, ready = self._below.copies[cache], cache.empty(), None
        if slab.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()  # what used that memory before may still run
        self.stats.backs += 1
        copies.coming = self._thread.submit(self._fill, cache, copies, slab, ready)
        return copies.coming

    def forget(self, cache: SlabCache) -> None:
        """Free all copies of a request, wherever it is. Idempotent."""
        copies = self._below.copies.pop(cache, None)
        if copies is not None:
            if copies.coming is not None and not copies.coming.cancel():
                wait([copies.coming])
            self._below.free_all(copies)

    def close(self) -> None:
        """Forget all requests, and delete what is on disk. Idempotent."""
        for cache in list(self._below.copies):
            self.forget(cache)
        self._thread.shutdown()
        if self._file is not None:
            self._file.close()

    # down

    def _copy(self, cache: SlabCache, copies: Copies) -> None:
        """The new tokens go to a segment of their own, or with all others to disk."""
        if len(copies.segments) == self._below.most(copies.disk.tokens):
            self._join(cache, copies)
        new = cache.length - copies.tokens
        if self._below.make_room(new * self._token_bytes, copies):
            copies.segments.append(self._segment(cache, copies.tokens, cache.length))
        else:
            self._write(cache, copies)

    def _join(self, cache: SlabCache, copies: Copies) -> None:
        """One segment fewer: of the two neighbours that are smallest together, the slab makes one.

        What is about to be copied is a neighbour, too: with the last one.
        """
        parts = copies.segments
        sizes = [part.data.shape[3] for part in parts]
        together = [*(a + b for a, b in pairwise(sizes)), sizes[-1]]
        at = together.index(min(together))
        pair = parts[at : at + 2]
        behind, start, stop, last = parts[at + 2 :], pair[0].start, pair[-1].stop, len(pair) == 1
        del parts[at:]
        self._below.free(pair)
        try:
            parts += [] if last else [self._segment(cache, start, stop)]
        except BaseException:  # no memory: what is behind the gap is of no use
            self._below.free(behind)
            raise
        parts += behind

    def _segment(self, cache: SlabCache, start: int, stop: int) -> Segment:
        """Tokens of a slab, in host memory that there is room for."""
        s = self._shape
        data = own_pages((s.num_layers, 2, s.num_kv_heads, stop - start, s.head_dim), s.dtype)
        if s.device.type == "cuda":
            lock_pages(data, "a request that is moved down", self.setting)
        data.copy_(cache.slab[:, :, :, start:stop])
        self._below.used_bytes += data.nbytes
        self.stats.copies_out += 1
        self.stats.bytes_out += data.nbytes
        return Segment(start, data)

    def _write(self, cache: SlabCache, copies: Copies) -> None:
        """All that is not on disk goes there, from the slab: host memory is full of others."""
        file, disk = self._file, copies.disk
        if file is None:
            raise self._full(cache.length)
        while not self._below.make_space(file.pieces(cache.length) - len(disk.numbers), copies):
            if not self._below.wait():
                raise self._full(cache.length)
        new = cache.length - disk.tokens
        self.stats.disk_bytes_written += file.extend(disk, cache.slab, 0, cache.length)
        self._below.free(copies.segments)
        self.stats.copies_out += file.copies(new)
        self.stats.bytes_out += new * self._token_bytes

    def _full(self, tokens: int) -> PoolFull:
        settings, where = self.setting, f"{self.used_bytes} of {self._below.host_bytes} are taken"
        if self._file is not None:
            settings += f" or {Spill.setting}"
            where += f", and {self._file.free} of {self._file.count} pieces on disk are free"
        return PoolFull(
            f"no room to move a request of {tokens} tokens down: it needs {self.cost(tokens)} "
            f"bytes, {where}; raise {settings}"
        )

    # up

    @torch.inference_mode()
    def _fill(
        self, cache: SlabCache, copies: Copies, slab: Tensor, ready: torch.cuda.Event | None
    ) -> None:
        """In the thread: what it reads does not change meanwhile."""
        if copies.lost is not None:
            raise copies.lost
        with _stream_after(ready):
            if self._file is not None and copies.disk.tokens:
                self.stats.disk_bytes_read += self._file.read(copies.disk, slab)
                self.stats.copies_back += self._file.copies(copies.disk.tokens)
            for part in copies.segments:
                slab[:, :, :, part.start : part.stop] = part.data
        self.stats.copies_back += len(copies.segments)
        self.stats.bytes_back += copies.tokens * self._token_bytes
        cache.load(slab)


@contextmanager
def _stream_after(ready: torch.cuda.Event | None) -> Iterator[None]:
    """On a GPU, a stream beside the one that computes; what is put on it is done at the end.

    After an error, too: the memory that is written to is somebody else's next.
    """
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            yield
    finally:
        stream.synchronize()
