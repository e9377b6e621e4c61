"""Loop two for many requests at once in static shapes: on a GPU, a step is one CUDA graph."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from engine.batch.capture import capturing, out_of_memory
from engine.batch.lanes import Lanes, OneLane, TwoStreams
from engine.batch.layer import Clock, Fresh, RingLayer, Select, SelectedLayer
from engine.cache import SparseStats
from engine.errors import EngineError
from engine.kernels.rotate_rows import rotate_rows
from engine.method import Method
from engine.model.pieces import Layer, Model
from engine.model.rope import Tables
from engine.sparse.cache import SparseCache, sparse_layers
from kvstore.kernels.resolve import MOST_SLOTS, Residency, empty, resolve
from kvstore.pool.pool import Pool

log = logging.getLogger(__name__)

YOUNGEST = 256  # the clock's first step: ages of what requests bring along are kept


class DeviceBatch:
    """Slots for running requests of a sparse method; a step decodes a token of each.

    What a request may hold of the device is taken once, for all slots. A step asks the device for
    nothing: lengths, choices and misses are tensors there, and kernels leave at once where a slot
    is free. So one graph serves however many slots are taken, and there are no buckets.

        step 1: as it is (kernels compile)   step 2: captured   from then on: replayed

    Args:
        pool: where the requests' KV lies; its rows may not move.
        slots: requests at most.
        capacity: tokens of each, the answer's included.
        select: chooses in place of the method's policy, for tests and benchmarks.
        lanes: what is fetched ahead, beside what; None makes a side stream on a GPU.

    Raises:
        EngineError: for a method that has no static shapes; see `why_not`.
    """

    def __init__(
        self,
        model: Model,
        method: Method,
        pool: Pool,
        *,
        slots: int,
        capacity: int,
        select: Select | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        if (reason := why_not(model, method, pool)) is not None:
            raise EngineError(f"this method is decoded request by request: {reason}")
        capacity = max(capacity, method.sinks + method.window + 1)
        self.model, self.method, self.capacity = model, method, capacity
        on_gpu = model.shape.device.type == "cuda"
        self.graph = on_gpu and model.static_shapes
        # streams made one after the other differ: torch gives out 32 of them in turn
        self._lanes = lanes or (TwoStreams(model.shape.device) if on_gpu else OneLane())
        self._stream = torch.cuda.Stream(model.shape.device) if on_gpu else None
        self._caches: list[SparseCache | None] = [None] * slots
        self._numbers = {i: n for n, i in enumerate(sparse_layers(model, method))}
        hot = method.hot_slots(method.tokens(capacity), model.shape.max_positions)
        rows = len(self._numbers) * slots, model.shape.num_kv_heads  # of all layers
        self._there = empty(*rows, tokens=capacity, slots=hot, device=model.shape.device)
        self._layers = [
            SelectedLayer(
                *(model.shape, layer.attention, layer.rope, method, pool, self._numbers[i]),
                Residency(*(table.split(slots)[self._numbers[i]] for table in self._there)),
                capacity=capacity,
                select=select,
            )
            if i in self._numbers
            else RingLayer(model.shape, layer.attention, slots, capacity)
            for i, layer in enumerate(model.layers)
        ]
        self._make_tensors(slots, -(-capacity // pool.shape.block_tokens))
        self._captured: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._held: Tensor | None = None

    def _make_tensors(self, slots: int, blocks: int) -> None:
        """What a step reads and writes, at fixed addresses."""
        s, where = self.model.shape, self.model.shape.device
        counts = torch.zeros(2, slots, dtype=torch.int32, device=where)
        counts[0] = -1
        now = torch.full((), YOUNGEST, dtype=torch.int32, device=where)
        self.clock = Clock(counts[0], counts[1], now)
        self._newest = torch.full_like(self._there.token[:, :, :1], -1)  # of each layer and slot
        self._steps = torch.zeros(slots, dtype=torch.int64, device=where)  # of each request
        self._blocks = torch.full((slots, blocks), -1, dtype=torch.int32, device=where)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=where)
        self._logits = torch.empty(slots, s.vocab, dtype=s.dtype, device=where)
        size = (s.num_layers, 2, slots, s.num_kv_heads, s.head_dim)
        self._made = torch.zeros(size, dtype=s.dtype, device=where)  # unrotated, for the store

    @property
    def slots(self) -> int:
        return len(self._caches)

    @property
    def nbytes(self) -> int:
        """Of everything that the slots take on the device."""
        own = (*self.clock, self._steps, self._blocks, self._tokens, self._logits, self._made)
        return sum(layer.nbytes for layer in self._layers) + sum(x.nbytes for x in own)

    # requests come and go

    def adopt(self, cache: SparseCache, room: int) -> int:
        """A request whose prompt is complete takes a free slot; returns its number.

        The batch then appends to the cache's blocks; the cache itself is not to be decoded with.

        Args:
            room: tokens that may follow.
        Raises:
            EngineError: if no slot is free, or the request is longer than `capacity`.
        """
        slot = next((i for i, taken in enumerate(self._caches) if taken is None), None)
        if slot is None or cache.length + room > self.capacity:
            raise EngineError(
                f"{len([c for c in self._caches if c])} of {self.slots} slots are taken, each of "
                f"{self.capacity} tokens; {cache.length + room} were asked for"
            )
        table = cache.blocks(cache.length + room)
        with self._current():
            now = int(self.clock.now)
            for i, layer in enumerate(self._layers):
                if isinstance(layer, RingLayer):
                    layer.adopt(slot, cache.view(i, cache.length))
                else:
                    layer.adopt(slot, cache.layer(i), now)
            self._blocks[slot] = -1
            self._blocks[slot, : len(table)] = table.to(self._blocks)
            self.clock.lengths[slot] = cache.length
            self._steps[slot] = 0
        cache.seated(_Seat(self, slot))
        self._caches[slot] = cache
        return slot

    def release(self, slot: int) -> None:
        """The slot is free; closing its cache does that."""
        self._caches[slot] = None
        with self._current():
            self.clock.lengths[slot] = 0
            for layer in self._layers:
                if isinstance(layer, SelectedLayer):
                    layer.release(slot)
            if self.model.shape.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # its blocks are somebody else's next

    def stats(self, slot: int) -> SparseStats:
        """Of a slot's request so far; waits for the device."""
        layers = [layer for layer in self._layers if isinstance(layer, SelectedLayer)]
        counts = torch.stack([layer.counts[:, slot] for layer in layers])
        selected, missed = counts.sum((0, 2)).tolist()
        return SparseStats(
            steps=int(self._steps[slot]),
            selected=selected,
            hits=selected - missed,
            fetched_bytes=missed * layers[0].row_bytes,
            host_key_rows=missed if layers[0].fetches_keys else 0,
        )

    # the step

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B vocab"]:
        """Append a token to every request; returns their next-token logits, until the next step.

        Args:
            tokens: of free slots: any.
        """
        with self._current():
            self._tokens.copy_(tokens)
            if self.graph and self._warm and self._captured is None:
                self._captured = self._capture()
            if self._captured is not None:
                self._captured.replay()
            else:
                self._run()
                self._warm = True
            self._record()
        return self._logits

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None, from now on, where there is no memory for a second one."""
        assert self._stream is not None
        graph = torch.cuda.CUDAGraph()
        try:
            with capturing(graph, self._stream):
                self._run()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            log.warning("no memory for a graph beside the batch: steps are launched one by one")
            self.graph = False
            return None
        return graph

    def _current(self) -> AbstractContextManager[object]:
        """Where kernels are launched: on the model's device, which need not be the thread's."""
        device = self.model.shape.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _run(self) -> None:
        """All layers, reading and writing tensors at fixed addresses only."""
        model, clock = self.model, self.clock
        clock.now.add_(1)
        taken = clock.lengths > 0
        clock.positions.copy_(clock.lengths.where(taken, -1))
        clock.lengths.add_(taken)
        self._steps.add_(taken)
        places = self._places()
        x = model.embed(self._tokens)
        tables = Tables(clock.positions.clamp_min(0))
        for layer in model.layers:
            tables[layer.rope]  # made before the lanes part: both read it
        try:
            for i in range(len(model.layers)):
                x = self._through(i, x, tables, places)
        finally:
            self._lanes.join()  # where a layer fails, too: a capture ends with one stream
            self._held = None
        self._logits.copy_(model.logits(x))

    def _places(self) -> Sequence[Int32[Tensor, "B Hk"]]:
        """Slots of the newest tokens in the hot buffers of each layer that has some, in one go."""
        if not len(self._newest):
            return []
        newest = self._newest.unflatten(0, (-1, self.slots))
        newest.copy_(self.clock.positions[:, None, None].expand_as(newest))
        found = resolve(self._newest, self._there, self.clock.now)
        return found.slots[..., 0].split(self.slots)

    def _through(self, i: int, x: Tensor, tables: Tables, places: Sequence[Tensor]) -> Tensor:
        """One layer, and beside it what is fetched for the next one."""
        layer, state = self.model.layers[i], self._layers[i]
        fresh = _fresh(layer, x, tables)
        torch.stack([fresh.k, fresh.v], out=self._made[i])
        self._lanes.join()
        self._held = x  # the side lane reads it until the next join
        self._ahead(i + 1, x, tables)
        if isinstance(state, RingLayer):
            heads = state.attend(fresh, self.clock)
        else:
            heads = state.attend(fresh, self.clock, self._blocks, places[self._numbers[i]])
        return layer.finish(x, heads.transpose(0, 1))

    def _ahead(self, layer: int, x: Tensor, tables: Tables) -> None:
        """Fetch what the next layer is likely to need, beside what this one computes."""
        if self.method.prefetch != "layer" or layer == len(self._layers):
            return
        state = self._layers[layer]
        if isinstance(state, SelectedLayer):
            with self._lanes.ahead():
                guess = _fresh(self.model.layers[layer], x, tables)
                state.fetch_ahead(guess, self.clock, self._blocks)

    def _record(self) -> None:
        """What the step made goes to the requests' recorders, and counts."""
        for slot, cache in enumerate(self._caches):
            if cache is not None:
                cache.take(self._made[:, :, slot])


@dataclass(slots=True)
class _Seat:
    """A slot that a request has."""

    batch: DeviceBatch
    slot: int

    def stats(self) -> SparseStats:
        return self.batch.stats(self.slot)

    def leave(self) -> None:
        self.batch.release(self.slot)


def _fresh(layer: Layer, x: Tensor, tables: Tables) -> Fresh:
    """What a layer makes of the newest tokens, request by request."""
    q, k, v = (part.transpose(0, 1).contiguous() for part in layer.qkv(x))
    cos, sin = tables[layer.rope]
    rotated_q, rotated_k = rotate_rows(q, k, cos, sin, interleaved=layer.rope.interleaved)
    return Fresh(rotated_q, q, rotated_k, k, v)


def why_not(model: Model, method: Method, pool: Pool) -> str | None:
    """What of a method has no static shapes, or is not done in them; None if all of it is."""
    positions = model.shape.max_positions
    slots = method.hot_slots(method.tokens(positions), positions)
    reasons = {
        "layers of this model share their KV": not all(layer.owns for layer in model.layers),
        "its budget is a share of the prompt": method.budget < 1,
        "top_p decides at each step how many tokens there are": method.top_p is not None,
        "certify doubles a budget where a sample asks for it": method.certify is not None,
        "it attends on the host": method.attend_on == "host",
        "blocks of a pool with a spill move": not pool.stationary,
        "its buffer does not hold a guess beside a choice (hot below 2)": method.prefetch == "layer"
        and method.hot < 2,
        f"its buffer has more than {MOST_SLOTS} rows (budget times hot)": slots > MOST_SLOTS,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
