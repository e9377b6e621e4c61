"""Captures that fail leave the thread and the process as they were. By a graph that is none."""

import gc
import threading
from contextlib import contextmanager

import pytest
import torch

from engine.batch import capture
from engine.batch.capture import capturing, out_of_memory


class Graph:
    """Notes what happens to it; fails at its end with `error`."""

    __class__ = torch.cuda.CUDAGraph  # what it passes for: a real one may need a GPU

    def __init__(self, seen, error=None):
        self.seen, self.error = seen, error

    def capture_begin(self, pool, capture_error_mode):
        assert pool == POOL
        self.seen.append((capture_error_mode, gc.isenabled()))

    def capture_end(self):
        self.seen.append("end")
        if self.error is not None:
            raise self.error


class Stream:
    __class__ = torch.cuda.Stream
    device = "cuda:1"


@pytest.fixture
def seen(monkeypatch):
    """Begin and end of captures and of streams, on a machine without any."""
    seen = []

    @contextmanager
    def stream(on):
        seen.append(("on", on.device))
        try:
            yield
        finally:
            seen.append(("off", on.device))

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(("sync", device)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: seen.append(of))
    return seen


POOL = (0, 7)
BEGUN = [("sync", "cuda:1"), ("on", "cuda:1"), ("thread_local", False)]


def test_a_capture_is_on_its_stream_and_nothing_is_collected_meanwhile(seen):
    with capturing(Graph(seen), Stream()):
        seen.append("run")
    assert seen == [*BEGUN, "run", "end", ("off", "cuda:1")]
    assert gc.isenabled()


@pytest.mark.parametrize("wrong", ["inside", "at its end", "both"])
def test_one_that_fails_gives_the_stream_back(seen, wrong):
    error = None if wrong == "inside" else RuntimeError("CUDA error: out of memory")

    def captured():
        with capturing(Graph(seen, error), Stream()):
            if wrong != "at its end":
                raise torch.OutOfMemoryError("no memory for it")

    with pytest.raises(RuntimeError) as raised:
        captured()
    assert out_of_memory(raised.value)
    given_back = [] if wrong == "inside" else [(1, POOL)]
    assert seen == [*BEGUN, "end", *given_back, ("off", "cuda:1")]
    assert gc.isenabled()
    assert not capture.CAPTURES.locked()


def test_collection_that_was_off_stays_off(seen):
    gc.disable()
    try:
        with capturing(Graph(seen), Stream()):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_captures_are_one_at_a_time(seen):
    order, inside, go_on = [], threading.Event(), threading.Event()

    def first():
        with capturing(Graph([]), Stream()):
            inside.set()
            assert go_on.wait(20)
            order.append(1)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    threading.Timer(0.1, go_on.set).start()
    with capturing(Graph([]), Stream()):
        order.append(2)
    thread.join()
    assert order == [1, 2]


def test_whatever_else_goes_wrong_is_no_lack_of_memory():
    assert not out_of_memory(RuntimeError("an illegal memory access was encountered"))
    assert not out_of_memory(None)
    later = RuntimeError("operation failed due to a previous error during capture")
    assert not out_of_memory(later)
    later.__context__ = torch.OutOfMemoryError("no")
    assert out_of_memory(later)
