"""Where a tensor is said to be, and what a capture notes of it."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
LOCKED: dict[int, int] = {}  # address of registered memory -> bytes
THREAD = threading.local()  # .capture, .stream
CpuGenerator = torch.Generator


def on_gpu(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "on_gpu")


def page_locked(tensor: Tensor) -> bool:
    at = tensor.data_ptr()
    registered = any(first <= at < first + size for first, size in list(LOCKED.items()))
    return registered or hasattr(tensor.untyped_storage(), "page_locked")


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
        self.launches: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._before: dict[int, tuple[Any, Any]] = {}  # storages, and what they held
        self._made: set[int] = set()

    def keep(self, tensors: list[Tensor]) -> None:
        """What these hold is theirs again when the capture ends."""
        for storage in (x.untyped_storage() for x in tensors):
            if storage._cdata not in self._made | self._before.keys() and storage.nbytes():
                self._before[storage._cdata] = storage, storage.clone()

    def note(self, launch: Callable[[], Any], made: list[Tensor]) -> None:
        self.launches.append((launch, made))
        self._made |= {x.untyped_storage()._cdata for x in made} - self._before.keys()

    def end(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()


def capture() -> Capture | None:
    return getattr(THREAD, "capture", None)
