"""Stored blocks, loaded to wherever a prompt has them, ahead of the loop that needs them."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import Cache
from engine.model.pieces import Model, owners
from engine.model.rope import RopeTable, Tables
from engine.staging import Busy, Placed, Staging, modest
from kvstore.block import BlockKey, KVBlock
from kvstore.store import TieredStore


class BlocksLost(Exception):
    """Blocks that were looked up could not be read."""

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        super().__init__(f"{len(keys)} stored blocks could not be read")
        self.keys = keys


class Side:
    """The stream that a loader's copies and kernels take, beside the loop's; none on a CPU.

    Torch gives streams of high priority out apart from others, so that no loader's is one that
    another thread captures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, None
        if device.type == "cuda":
            self._stream = _beside(device)
            # the memory that is loaded to may be in use by what was launched before
            self._stream.wait_event(torch.cuda.current_stream(device).record_event())

    def here(self) -> AbstractContextManager[object]:
        """What is launched inside goes there."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """Where it is now."""
        return None if self._stream is None else self._stream.record_event()

    def meet(self, mark: torch.cuda.Event, made: Iterable[Tensor]) -> None:
        """What the caller's stream does from now on is after the mark, and may read what was made.

        Memory that was taken here is given to others only when both streams are done with it.
        """
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(mark)
        for tensor in made:
            tensor.record_stream(stream)

    def settle(self) -> None:
        """Return when it has done everything."""
        if self._stream is not None:
            self._stream.synchronize()


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders: torch gives memory that was freed to its stream alone."""
    return torch.cuda.Stream(device, priority=-1)


class Loader:
    """Loads blocks into a cache, one group of layers after the other, in a thread.

    Keys rest unrotated, so a move is a rotation to the new place. `wait(layer)` returns when that
    layer's are there. Later blocks overwrite earlier ones where they overlap.

    Args:
        length: of the prompt, or of its start up to the last block.
        computed: blocks that need not be read.
        paced: place a group when the loop comes to the last layer before it, not at once: for loops
            that free a layer before they go on to the next, so that few of them are there.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        store: TieredStore,
        blocks: Sequence[Placed],
        length: int,
        computed: Mapping[BlockKey, KVBlock] | None = None,
        *,
        paced: bool = False,
    ) -> None:
        self._cache, self._num_layers = cache, model.shape.num_layers
        self._device = model.shape.device
        self._owners = owners(model)
        self.tables = Tables(torch.arange(length, device=self._device))
        if cache.recorder is not None:
            cache.recorder.open(length)  # before the streams part: both write to it
        self._side = Side(self._device)
        self._marks: dict[int, torch.cuda.Event | None] = {}
        self._busy, self.waited_s = Busy(), 0.0
        self._staging = Staging(model.shape, store, blocks, computed or {}, self._busy)
        self._loads: dict[int, Future[None]] = {}
        self._cancelled = threading.Event()
        self._thread = ThreadPoolExecutor(1, "headrace-loader", modest)
        self._left = iter(self._staging.groups)
        self._at_a_time = 1 if paced else None
        self._submit()

    @property
    def load_s(self) -> float:
        """Seconds in which something was read or placed."""
        return self._busy.seconds

    def wait(self, layer: int) -> None:
        """Return when `layer` is in the cache. BlocksLost if a block of it is gone."""
        start = time.perf_counter()
        self._loads[layer].result()
        self.waited_s += time.perf_counter() - start
        if (mark := self._marks[layer]) is not None:
            self._side.meet(mark, self._cache.view(layer, 0))
        if layer + 1 not in self._loads:
            self._submit()

    # as a future of all layers, for loaders that are not paced

    def done(self) -> bool:
        """Whether all is there, or lost: `result` returns, or raises, at once."""
        return all(load.done() for load in self._loads.values())

    def result(self) -> None:
        """Return when all layers are in the cache. BlocksLost if a block is gone."""
        for layer in range(self._num_layers):
            self.wait(layer)

    def add_done_callback(self, call: Callable[[Future[None]], object]) -> None:
        """Call from whatever thread, once `done`."""
        self._loads[max(self._loads)].add_done_callback(call)  # one thread loads them, in order

    def cancel(self) -> None:
        """Stop loading; returns when nothing writes to the cache any more: after one batch."""
        self._cancelled.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._side.settle()
        self._staging.close()

    def _submit(self) -> None:
        for group in islice(self._left, self._at_a_time):
            self._loads |= dict.fromkeys(group, self._thread.submit(self._load, group))

    @torch.inference_mode()
    def _load(self, group: range) -> None:
        """Read some layers of every block, rotate the keys, and put them in place."""
        with self._side.here():
            self._bring(group)
            self._marks |= dict.fromkeys(group, self._side.mark())

    def _bring(self, group: range) -> None:
        lost: list[BlockKey] = []
        for layer in group:
            self.tables[self._owners[layer].rope]  # made while the first batch is read
        for _ in self._staging.batches:
            if self._cancelled.is_set():
                raise CancelledError
            staged = self._staging.take()
            if staged.group != group:
                raise RuntimeError(f"layers {staged.group} could not be placed: see their error")
            lost += staged.lost
            if not lost:
                with self._busy:
                    self._place(group, staged.start, staged.data)
        if lost:
            raise BlocksLost(lost)

    def _place(self, group: range, start: int, staged: Float[Tensor, "B n 2 Hk P D"]) -> None:
        """B blocks of layers `group` go to the tokens from `start` on."""
        data = staged.to(self._device).permute(1, 2, 3, 0, 4, 5)  # n 2 Hk B P D
        blocks, tokens = data.shape[3:5]
        span, recorder = slice(start, start + blocks * tokens), self._cache.recorder
        for i, (k, v) in zip(group, data, strict=True):
            rope, kv = self._owners[i].rope, self._cache.view(i, span.stop)
            cos, sin = self.tables[rope]
            rope.place(k, RopeTable(cos[span], sin[span]), kv.k[:, span])
            kv.v[:, span].unflatten(1, (blocks, tokens)).copy_(v)
            if recorder is not None:
                recorder.write(i, start, k.flatten(1, 2), v.flatten(1, 2))
