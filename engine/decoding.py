"""Who decodes running requests: a loop over them, or on a GPU a batch in static shapes."""

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from engine.decode import decode
from engine.errors import EngineError
from engine.memory import Memory
from engine.model.pieces import Model
from engine.request import Running
from engine.sparse.cache import SparseCache

if TYPE_CHECKING:
    from engine.batch.batch import DeviceBatch

log = logging.getLogger(__name__)

USABLE = 0.9  # of what is free: activations and graphs take some, too


@runtime_checkable
class Decoding(Protocol):
    """Takes requests whose prompt is complete, and a step of all that are live."""

    def join(self, run: Running) -> None: ...
    def step(self, live: Sequence[Running]) -> Iterable[Float[Tensor, " vocab"]]: ...


class Loop:
    """Projections of all, attention of each by itself: for any cache."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def join(self, run: Running) -> None:
        """Nothing: the cache is all there is."""

    def step(self, live: Sequence[Running]) -> Iterable[Float[Tensor, " vocab"]]:
        """Logits after each one's newest token."""
        caches = [run.cache for run in live if run.cache is not None]
        newest = [run.tokens[-1] for run in live]
        return decode(
            self._model, caches, torch.tensor(newest, device=self._model.shape.device)
        ).unbind()


class Seated:
    """Requests in the slots of one batch; a cache that is closed leaves its slot."""

    def __init__(self, batch: "DeviceBatch") -> None:
        self._batch = batch
        self._slots: dict[Running, int] = {}

    @property
    def nbytes(self) -> int:
        """Of the device, whoever is here."""
        return self._batch.nbytes

    def join(self, run: Running) -> None:
        """The request takes a slot."""
        assert isinstance(run.cache, SparseCache)
        self._slots[run] = self._batch.adopt(run.cache, run.capacity - run.cache.length)

    def leave(self, run: Running) -> None:
        """Forget a request that has ended; its cache gives its slot back when it is closed."""
        self._slots.pop(run, None)

    def step(self, live: Sequence[Running]) -> Iterable[Float[Tensor, " vocab"]]:
        """Logits after each one's newest token."""
        slots = [self._slots[run] for run in live]
        tokens = [0] * self._batch.slots
        for slot, run in zip(slots, live, strict=True):
            tokens[slot] = run.tokens[-1]
        rows = self._batch.step(torch.tensor(tokens)).cpu()  # one copy for all that are sampled
        return [rows[slot] for slot in slots]


def places(model: Model, memory: Memory, most: int, capacity: int, cache_bytes: int) -> int:
    """How many requests of so many tokens a service decodes at a time: all, where there is room.

    A batch takes what its slots hold from the start, which at 128k tokens each is gigabytes.

    Args:
        cache_bytes: of the device, that are not the batch's.
    Raises:
        EngineError: if the device has no room for one.
    """
    device = model.shape.device
    if not memory.batched or device.type != "cuda":
        return most
    one = seats(model, memory, 1, capacity)
    assert one is not None
    slot_bytes = one.nbytes
    del one
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return fitting(most, slot_bytes, int(free * USABLE) - cache_bytes, capacity)


def fitting(most: int, slot_bytes: int, free_bytes: int, capacity: int) -> int:
    """How many slots of a batch fit. EngineError for none."""
    fit = free_bytes // slot_bytes
    if fit < 1:
        raise EngineError(
            f"a request of up to {capacity} tokens takes {slot_bytes} bytes of the device, which "
            f"has {max(0, free_bytes)} beside cache_bytes: lower schedule.max_tokens, cache_bytes "
            "or method.hot"
        )
    if fit < most:
        log.warning(
            "the device has room for %d requests of %d tokens at a time, not for %d "
            "(schedule.max_running, schedule.max_tokens)", fit, capacity, most,
        )  # fmt: skip
    return min(most, fit)


def seats(model: Model, memory: Memory, slots: int, capacity: int) -> Seated | None:
    """A batch of so many requests of so many tokens each, where requests are decoded in one.

    Raises:
        EngineError: if the device has no room for what a batch takes.
    """
    if memory.pool is None or not memory.batched:
        return None
    from engine.batch.batch import DeviceBatch  # needs Triton, which not every machine has

    try:
        return Seated(
            DeviceBatch(model, memory.method, memory.pool, slots=slots, capacity=capacity)
        )
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"the device has no room for {slots} requests of up to {capacity} tokens at once "
            f"({error}): ask for fewer or shorter ones, or lower method.hot"
        ) from error


def decoding(model: Model, memory: Memory, runs: Sequence[Running]) -> Decoding:
    """For these requests: a batch where there is a GPU and a sparse method of static shapes."""
    return seats(model, memory, len(runs), max(run.capacity for run in runs)) or Loop(model)
