"""Launches of kernels, which take tensors of the GPU."""

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from tests.pretended.memory import capture, current, memory_of, on_gpu, page_locked, tensors_in
from tests.pretended.order import GRAIN, Touched, happens

LAUNCH = threading.RLock()  # the interpreter runs one kernel at a time


def take_kernels() -> None:
    """From now on."""
    call, launches = GridExecutor.__call__, note_accesses()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = tensors_in(args, kwargs)
        for x in given:
            if not on_gpu(x) and not page_locked(x):
                raise ValueError(f"{self.fn.__name__}: a tensor of the CPU, {tuple(x.shape)}")

        def run() -> None:
            with (
                torch._C.DisableTorchFunction(),
                LAUNCH,
                torch.utils._python_dispatch._disable_current_modes(),
            ):
                launches.append(([], []))
                try:
                    call(self, *args, **kwargs)
                finally:
                    reads, writes = launches.pop()
                happens(self.fn.__name__, _of(reads, given), _of(writes, given), current())

        if (graph := capture()) is not None:
            graph.keep(given)
            graph.note(run, [])
        run()

    GridExecutor.__call__ = launch


def note_accesses() -> list[Any]:
    """Where the launch that runs keeps the addresses that it reads and writes, with their size."""
    launches: list[Any] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    update = InterpreterBuilder.create_atomic_rmw

    def note(writes: bool, pointers: Any, mask: Any) -> None:
        lanes = np.broadcast_to(mask.data != 0, pointers.data.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        launches[-1][writes].append((pointers.data[lanes].astype(np.int64), size))

    def loads(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(False, pointers, mask)
        return load(self, pointers, mask, *rest)

    def stores(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        note(True, pointers, mask)
        return store(self, pointers, values, mask, *rest)

    def updates(self: Any, how: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        note(True, pointers, mask)
        return update(self, how, pointers, values, mask, *rest)

    changed: tuple[tuple[str, Any], ...] = (
        ("create_masked_load", loads),
        ("create_masked_store", stores),
        ("create_atomic_rmw", updates),
    )
    for name, method in changed:
        setattr(InterpreterBuilder, name, method)
    return launches


def _of(accesses: Any, given: list[Tensor]) -> list[Touched]:
    """What of the memory of these tensors was touched."""
    if not accesses:
        return []
    sizes = np.repeat([size for _, size in accesses], [len(at) for at, _ in accesses])
    at = np.concatenate([at for at, _ in accesses])
    found = []
    for memory in {id(m): m for m in map(memory_of, given) if m is not None}.values():
        inside = (at >= memory.first) & (at < memory.first + memory.nbytes)
        first = at[inside] - memory.first
        ends = np.concatenate([first, first + sizes[inside] - 1])  # of elements: two grains at most
        found.append((memory, ends // GRAIN))
    return found
