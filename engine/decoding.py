"""Who decodes running requests: a loop over them, or on a GPU a batch in static shapes."""

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


def seats(model: Model, memory: Memory, slots: int, capacity: int) -> Seated | None:
    """A batch of so many requests of so many tokens each, where requests are decoded in one.

    Raises:
        EngineError: if the device has no room for what a batch takes.
    """
    if memory.pool is None or not memory.batched:
        return None
    from engine.batch.batch import DeviceBatch, why_not  # needs Triton, which not every machine has

    if why_not(model, memory.method, memory.pool) is not None:
        return None
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
