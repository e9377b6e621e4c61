"""A GPU made of the CPU's memory: what a CPU's tests cannot see of the path on a GPU.

    pytest -p tests.pretended -m gpu tests/engine/test_gpu.py

Tensors that were made on "cuda" or brought there are tensors of the CPU that say so. As on a GPU,

  - an operation takes tensors of one device, a kernel none of the CPU's but page-locked ones;
  - a captured graph does not run until it is replayed, on the addresses that it was captured with;
  - inside a capture nothing may wait for the device, nor be copied from or to pageable memory, and
    streams are those that wait for the capture's own, which waits for them before its end;
  - streams and the host wait for each other where they touch the same memory, or give it back:
    where nothing makes them wait is an error, whatever came first this time (`order`).

Kernels are interpreted. Whatever is launched has happened when the launch returns, on any stream,
and memory has no end: speed and what a graph costs are a real GPU's to show.
"""

import os
import threading
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import pytest

from tests import sanitizer
from tests.pretended.cuda import replace_cuda
from tests.pretended.kernels import take_kernels
from tests.pretended.mode import Pretended
from tests.pretended.order import RACES, Race

sanitizer.install = lambda: None  # it takes time, and is for the kernels' own tests


@pytest.hookimpl(tryfirst=True)  # before other plugins import what is changed here
def pytest_configure(config: Any) -> None:
    """There is a GPU from now on."""
    replace_cuda()
    enter_in_all_threads()
    take_kernels()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """A test gives no memory back too early."""
    yield
    found = list(RACES)
    RACES.clear()
    if found:
        raise Race("\n".join(found))


def enter_in_all_threads() -> None:
    """A mode of torch is one thread's."""
    run = threading.Thread.run

    def in_mode(thread: threading.Thread) -> None:
        with Pretended():
            run(thread)

    threading.Thread.run = in_mode  # type: ignore[method-assign]
    Pretended().__enter__()
