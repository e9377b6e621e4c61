"""What the pretended GPU finds of work whose order nobody enforced. A real one just does it."""

import gc

import pytest
import torch
from torch import Tensor

from engine.batch.capture import capturing
from engine.kernels.norm_rows import norm_rows_triton
from tests.pretended.order import RACES, Race

pretended = torch.cuda.is_available() and torch.cuda.get_device_name() == "pretended"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not pretended, reason="a real GPU")]


@pytest.fixture
def x():
    return torch.ones(2, 64, device="cuda")


@pytest.fixture
def beside():
    """A stream that begins after what was done before."""
    made = torch.cuda.Stream()
    made.wait_stream(torch.cuda.current_stream())
    return made


def normed(x: Tensor) -> Tensor:
    return norm_rows_triton(x, torch.ones(64, device="cuda"), 1e-6)


def given_back() -> int:
    """How often that was a race; the test knows of it."""
    gc.collect()  # the interpreter's launches know their tensors in rings
    found = len(RACES)
    RACES.clear()
    return found


@pytest.mark.parametrize("work", [lambda x: x * 2, normed, lambda x: x.add_(1), Tensor.cpu])
def test_streams_wait_for_what_others_write(x, beside, work):
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        x.zero_()
    with pytest.raises(Race, match=r"is in no order with zero_ of .*, which wrote the same memory"):
        work(x)
    torch.cuda.current_stream().wait_stream(beside)
    work(x)


def test_streams_wait_for_what_others_read(x, beside):
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        x[0] * 2
    x[1] = 3
    with pytest.raises(Race, match="which reads the same memory"):
        x += 1
    beside.synchronize()
    x += 1


def test_an_event_is_what_was_before_it(x):
    first, second, event = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    first.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(first):
        x[0] = 1
        event.record()
        x[1] = 1
    with torch.cuda.stream(second):
        second.wait_event(event)
        x[0] += 1
        with pytest.raises(Race):
            x[1] += 1
    torch.cuda.synchronize()


def test_the_host_waits_for_its_memory(x):
    locked = torch.zeros(2, 64, pin_memory=True)
    locked.copy_(x, non_blocking=True)
    with pytest.raises(Race, match="on the host is in no order with copy_"):
        locked.sum()
    torch.cuda.current_stream().synchronize()
    assert locked.sum() == 128
    x.copy_(locked, non_blocking=True)
    assert locked.sum() == 128  # both read
    with pytest.raises(Race):
        locked.zero_()
    locked.copy_(x)
    locked.zero_()


@pytest.mark.parametrize("done", ["nothing", "waited", "named"])
def test_memory_is_given_back_when_nobody_uses_it(x, beside, done):
    beside.wait_stream(torch.cuda.current_stream())
    more = x + 1
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        more * 2
    if done == "waited":
        torch.cuda.current_stream().wait_stream(beside)
    if done == "named":
        more.record_stream(beside)
    del more
    assert given_back() == (done == "nothing")


def test_page_locked_memory_outlives_kernels(x):
    """Torch waits for copies alone."""
    x.copy_(torch.ones(2, 64, pin_memory=True), non_blocking=True)
    assert not given_back()
    norm_rows_triton(x, torch.ones(64, pin_memory=True), 1e-6)
    assert given_back() == 1


def test_a_capture_has_its_own_order(x):
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    with capturing(torch.cuda.CUDAGraph(), main):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            x[0] += 1
        x[1] += 1
        with pytest.raises(Race):
            x.sum()
        main.wait_stream(side)


def test_a_capture_ends_with_one_stream(x):
    main, side = torch.cuda.Stream(), torch.cuda.Stream()

    def captured() -> None:
        with capturing(torch.cuda.CUDAGraph(), main):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                x.add_(1)

    with pytest.raises(RuntimeError, match="unjoined"):
        captured()


def test_a_capture_is_of_streams_that_wait_for_its_own(x, beside):
    main = torch.cuda.Stream()
    event = beside.record_event()
    with capturing(torch.cuda.CUDAGraph(), main):
        with torch.cuda.stream(beside), pytest.raises(RuntimeError, match="not captured"):
            x += 1
        with pytest.raises(RuntimeError, match="uncaptured"):
            main.wait_event(event)
