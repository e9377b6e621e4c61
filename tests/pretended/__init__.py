"""A GPU made of the CPU's memory: what a CPU's tests cannot see of the path on a GPU.

    pytest -p tests.pretended -m gpu tests/engine/test_gpu.py

Tensors that were made on "cuda" or brought there are tensors of the CPU that say so. As on a GPU,

  - an operation takes tensors of one device, a kernel none of the CPU's but page-locked ones;
  - a captured graph does not run until it is replayed, on the addresses that it was captured with;
  - inside a capture nothing may wait for the device, nor be copied from or to pageable memory.

Kernels are interpreted. Whatever is launched has happened when the launch returns, on any stream,
and memory has no end: order, speed and what a graph costs are a real GPU's to show.
"""

import os
import threading
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest
import torch

from tests import sanitizer
from tests.pretended.cuda import replace_cuda
from tests.pretended.memory import capture, on_gpu, page_locked, tensors_in
from tests.pretended.mode import Pretended

sanitizer.install = lambda: None  # it takes time, and is for the kernels' own tests
LAUNCH = threading.RLock()  # the interpreter runs one kernel at a time


@pytest.hookimpl(tryfirst=True)  # before other plugins import what is changed here
def pytest_configure(config: Any) -> None:
    """There is a GPU from now on."""
    replace_cuda()
    enter_in_all_threads()
    take_kernels()


def enter_in_all_threads() -> None:
    """A mode of torch is one thread's."""
    run = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with Pretended():
            run(thread)

    threading.Thread.run = in_mode  # type: ignore[method-assign]
    Pretended().__enter__()


def take_kernels() -> None:
    """Launches take tensors of the GPU."""
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        given = tensors_in(args, kwargs)
        for x in given:
            if not on_gpu(x) and not page_locked(x):
                raise ValueError(f"{self.fn.__name__}: a tensor of the CPU, {tuple(x.shape)}")

        def run() -> None:
            with torch._C.DisableTorchFunction(), LAUNCH:
                call(self, *args, **kwargs)

        if (graph := capture()) is not None:
            graph.keep(given)
            graph.note(run, [])
        run()

    GridExecutor.__call__ = launch
