"""Where a tensor is said to be, and what a capture notes of it."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.pretended.order import FIRST, HOST, Line, Memory, Touched, grains

GPU = torch.device("cuda", 0)
LOCKED: dict[int, Memory] = {}  # by the address of registered memory
THREAD = threading.local()  # .capture, .stream, .line
CpuGenerator = torch.Generator


def on_gpu(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "on_gpu")


def page_locked(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "page_locked") or _registered(tensor) is not None


def _registered(tensor: Tensor) -> Memory | None:
    at = tensor.data_ptr()
    return next((x for first, x in list(LOCKED.items()) if 0 <= at - first < x.nbytes), None)


def memory_of(tensor: Tensor) -> Memory | None:
    """None of what only the host has."""
    storage = tensor.untyped_storage()
    found = getattr(storage, "on_gpu", None) or getattr(storage, "page_locked", None)
    found = found or _registered(tensor)
    graph = capture()
    return found if graph is None or found is None else graph.memory(found)


def bring(tensor: Tensor) -> None:
    """To the GPU, unless it is there."""
    storage = tensor.untyped_storage()
    if not hasattr(storage, "on_gpu"):
        owner = current() if capture() is None else None
        storage.on_gpu = Memory(storage.data_ptr(), storage.nbytes(), owner)


def lock(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    storage.page_locked = Memory(storage.data_ptr(), storage.nbytes(), HOST)


def touched(tensors: list[Tensor]) -> list[Touched]:
    found = [(memory_of(x), x) for x in tensors if x.numel()]
    return [(memory, grains(x, memory)) for memory, x in found if memory is not None]


def current() -> Line:
    """The stream that work goes to."""
    return getattr(THREAD, "line", FIRST)


def tensors_in(*found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def type_of(device: Any) -> str:
    return "cuda" if isinstance(device, int) else torch.device(device).type


def not_captured(what: str) -> None:
    if capture() is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class Capture:
    """What was launched on the device, to be done again."""

    def __init__(self) -> None:
        self.lines = {current()}  # that are captured
        self.launches: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._before: dict[int, tuple[Any, Any]] = {}  # storages, and what they held
        self._made: set[int] = set()
        self._memories: dict[int, tuple[Memory, Memory]] = {}

    def memory(self, real: Memory) -> Memory:
        """What is done to it in here, where nothing has run: only its own order counts."""
        of = self._memories.setdefault(id(real), (real, Memory(real.first, real.nbytes, None)))
        return of[1]

    def keep(self, tensors: list[Tensor]) -> None:
        """What these hold is theirs again when the capture ends."""
        if current() not in self.lines:
            raise RuntimeError("inside a capture, work goes to a stream that is not captured")
        for storage in (x.untyped_storage() for x in tensors):
            if storage._cdata not in self._made | self._before.keys() and storage.nbytes():
                self._before[storage._cdata] = storage, storage.clone()

    def note(self, launch: Callable[[], Any], made: list[Tensor]) -> None:
        self.launches.append((launch, made))
        self._made |= {x.untyped_storage()._cdata for x in made} - self._before.keys()

    def end(self) -> None:
        """RuntimeError where a stream was not joined."""
        done = current().known
        if any(memory.used(done) for _, memory in self._memories.values()):
            raise RuntimeError("capturing stream has unjoined work")
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()


def capture() -> Capture | None:
    return getattr(THREAD, "capture", None)
