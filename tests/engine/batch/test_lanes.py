"""The order of computing and fetching ahead in a step, by a clock that is not real."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from engine.batch.lanes import OneLane, TwoStreams
from engine.batch.layer import SelectedLayer
from engine.model.rope import Rope
from tests.engine.batch.test_batch import Batch, small
from tests.engine.families import build, prompt

COMPUTE = 1.0  # what a layer takes on the main lane
FETCH = 0.7  # what fetching ahead takes on the side lane


class Clocks:
    """Two lanes that take simulated time; what was done when, and in which."""

    def __init__(self):
        self.main = self.side = 0.0
        self.aside = False
        self.events = []

    @contextmanager
    def ahead(self):
        assert not self.aside
        self.side, self.aside = max(self.side, self.main), True
        yield
        self.aside = False

    def join(self):
        self.main = max(self.main, self.side)

    def spend(self, what, layer, seconds):
        lane = "side" if self.aside else "main"
        start = getattr(self, lane)
        setattr(self, lane, start + seconds)
        self.events.append((what, layer, lane, start, start + seconds))


def timed(monkeypatch, clocks, compute=COMPUTE, fetch=FETCH):
    """Every layer's work takes time on the lane that it is asked for in."""
    attend, ahead = SelectedLayer.attend, SelectedLayer.fetch_ahead

    def slow_attend(self, *args):
        clocks.spend("attend", self._number, compute)
        return attend(self, *args)

    def slow_ahead(self, *args):
        clocks.spend("fetch", self._number, fetch)
        return ahead(self, *args)

    monkeypatch.setattr(SelectedLayer, "attend", slow_attend)
    monkeypatch.setattr(SelectedLayer, "fetch_ahead", slow_ahead)


def step(lanes, **changes):
    with Batch(build("llama"), small("headrace", prefetch="layer", **changes), lanes=lanes) as b:
        slot, _ = b.join(prompt(150))
        return b.step({slot: 3})[slot]


def test_a_layer_is_fetched_beside_the_one_before_and_never_used_earlier(monkeypatch):
    clocks = Clocks()
    timed(monkeypatch, clocks)
    step(clocks)
    when = {(what, layer): (lane, start, stop) for what, layer, lane, start, stop in clocks.events}
    assert [key for key in when if key[0] == "fetch"] == [("fetch", 1), ("fetch", 2)]
    for layer in (1, 2):
        lane, issued, there = when["fetch", layer]
        _, _, before = when["attend", layer - 1]
        _, used, _ = when["attend", layer]
        assert lane == "side"
        assert issued < before  # beside what the layer before computes
        assert used >= there  # and there when it is needed
    assert clocks.main == pytest.approx(3 * COMPUTE)  # nothing of it is waited for


def test_what_fetching_takes_longer_than_a_layer_is_all_that_is_waited_for(monkeypatch):
    clocks = Clocks()
    timed(monkeypatch, clocks, fetch=1.5)
    step(clocks)
    assert clocks.main == pytest.approx(1.5 + 1.5 + COMPUTE)


def test_rotations_are_made_before_the_lanes_part(monkeypatch):
    """What one lane makes and the other reads would be read too early."""
    clocks, made = Clocks(), []
    table = Rope.table
    monkeypatch.setattr(Rope, "table", lambda *a: made.append(clocks.aside) or table(*a))
    module = build("gemma3")  # its layers have two rotations
    with Batch(module, small("headrace", prefetch="layer"), lanes=clocks) as batch:
        slot, _ = batch.join(prompt(90))
        made.clear()
        batch.step({slot: 3})
    assert len(made) == 2
    assert not any(made)


def test_in_one_lane_the_same_comes_out_one_after_the_other(monkeypatch):
    torch.testing.assert_close(step(Clocks()), step(OneLane()), rtol=0, atol=0)


class Stream:
    """Stands in for one of CUDA's, and remembers what it waited for."""

    device = torch.device("cuda:0")

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def streams(monkeypatch):
    """The current stream and the side stream, while a graph is captured."""
    main, side = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return main, side


def test_a_stream_waits_for_the_side_stream_only_if_that_forked(streams):
    """In a capture it may not wait for a stream that is no part of it."""
    main, side = streams
    lanes = TwoStreams(torch.device("cuda:0"))
    lanes.join()
    assert main.waited == []
    with lanes.ahead():
        assert side.waited == [main]
    lanes.join()
    lanes.join()
    assert main.waited == [side]


def test_a_step_that_is_not_captured_keeps_to_its_stream(streams, monkeypatch):
    """The side stream may be in another thread's capture."""
    main, side = streams
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    lanes = TwoStreams(torch.device("cuda:0"))
    with lanes.ahead():
        assert side.waited == []
    lanes.join()
    assert main.waited == []


def test_a_step_that_fails_leaves_one_lane(monkeypatch):
    """A capture that ends with two streams is an error of its own, which hides the first."""
    clocks = Clocks()
    timed(monkeypatch, clocks, fetch=5.0)
    attend = SelectedLayer.attend

    def fails(self, *args):
        if self._number == 1:
            raise torch.OutOfMemoryError("no memory")
        return attend(self, *args)

    monkeypatch.setattr(SelectedLayer, "attend", fails)
    with pytest.raises(torch.OutOfMemoryError):
        step(clocks)
    assert clocks.side > 5
    assert clocks.main == clocks.side
