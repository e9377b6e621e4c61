"""What torch has of CUDA: streams, events, graphs, generators and page-locked memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.pretended.memory import (
    GPU,
    LOCKED,
    THREAD,
    Capture,
    CpuGenerator,
    capture,
    current,
    memory_of,
    not_captured,
    tensors_in,
    touched,
    type_of,
)
from tests.pretended.order import HOST, LINES, LOCK, Accesses, Line, Memory, happens


class Event:
    """What a stream had done, or was to do, when it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.known = np.zeros(LINES, np.int32)
        self._of: Capture | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        line = (stream or current_stream()).line
        self.known, self._of = line.known.copy(), capture()

    def wait(self, stream: "Stream | None" = None) -> None:
        line, graph = (stream or current_stream()).line, capture()
        if self.known.any() and self._of is not graph:
            raise RuntimeError("dependency created on uncaptured work in another stream")
        if graph is not None:
            graph.lines.add(line)
        line.learn(self.known)

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        not_captured("waiting for an event")
        HOST.learn(self.known)


class Stream:
    """One of the streams, of which there are as many as lines."""

    device = GPU
    made = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        with LOCK:
            Stream.made += 1
            of = Stream.made if Stream.made < LINES else 2 + Stream.made % (LINES - 2)
            self.line = Line.every[of] if of < len(Line.every) else Line()

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        not_captured("waiting for a stream")
        HOST.learn(self.line.known)


FIRST = Stream()


@contextmanager
def streaming(stream: Stream | None) -> Iterator[None]:
    before = current_stream()
    THREAD.stream = stream or before
    THREAD.line = THREAD.stream.line
    try:
        yield
    finally:
        THREAD.stream, THREAD.line = before, before.line


def current_stream(device: Any = None) -> Stream:
    return getattr(THREAD, "stream", FIRST)


class Graph:
    def capture_begin(self, **_: Any) -> None:
        not_captured("a capture")
        THREAD.capture = Capture()

    def capture_end(self) -> None:
        self._captured, THREAD.capture = THREAD.capture, None
        with torch._C.DisableTorchFunction():
            self._captured.end()

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for launch, made in self._captured.launches:
                with Accesses() as seen:
                    for old, new in zip(made, tensors_in(launch()), strict=True):
                        if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                            old.copy_(new)
                happens("a replay", touched(seen.reads), touched(seen.writes), current())


@contextmanager
def graph(made: Graph, **_: Any) -> Iterator[None]:
    made.capture_begin()
    try:
        yield
    finally:
        made.capture_end()


class Generator(CpuGenerator):
    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = CpuGenerator.__new__(cls)
        made.where = type_of(device)
        return made

    def __init__(self, device: Any = "cpu") -> None: ...


class Cudart:
    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        LOCKED[address] = Memory(address, size, HOST)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del LOCKED[address]
        return 0


@contextmanager
def device(*_: Any) -> Iterator[None]:
    yield


def record_stream(tensor: Tensor, stream: Stream) -> None:
    assert tensor.is_cuda, "a tensor of the CPU is on no stream"
    memory_of(tensor).named.add(stream.line.number)


def wait_for_all(device: Any = None) -> None:
    not_captured("waiting for the device")
    for line in list(Line.every):
        HOST.learn(line.known)


def replace_cuda() -> None:
    """torch finds a GPU from now on."""
    cuda: Any = torch.cuda
    facts = {"name": "pretended", "total_memory": 80 << 30, "major": 9, "minor": 0}
    found = SimpleNamespace(**facts, multi_processor_count=132)
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, Graph, graph
    cuda.stream, cuda.current_stream, cuda.device, cuda.device_of = (
        *(streaming, current_stream, device, device),
    )
    cuda.is_available, cuda.device_count = (lambda: True), (lambda: 1)
    cuda.current_device = lambda: 0
    cuda.is_current_stream_capturing = lambda: capture() is not None
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda.synchronize = wait_for_all
    cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.empty_cache = cuda.init = cuda._lazy_init = lambda: None
    cuda._sleep = lambda cycles: None
    cuda.mem_get_info = lambda device=None: (60 << 30, 80 << 30)
    cuda.get_device_properties = lambda device=None: found
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_name = lambda device=None: "pretended"
    cuda.cudart = Cudart
    torch.Generator = Generator  # type: ignore[misc]
    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign]
