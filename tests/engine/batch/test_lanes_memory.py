"""What one lane of a step writes, the other neither reads nor writes before the two join."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.batch.batch import DeviceBatch
from tests.engine.batch.test_batch import Batch, small
from tests.engine.families import build, prompt
from tests.sanitizer import span


class Traffic(TorchDispatchMode):
    """The lanes of a step, with the memory that torch's operations touch in each of them."""

    def __init__(self):
        super().__init__()
        self.parted = self.aside = False
        self.touched = {"main": [], "side": []}  # since they parted: (write?, first, last, name)
        self.kept = []  # nothing is freed, or memory would be used again
        self.shared = []  # what both touched and one wrote
        self.windows = 0

    @contextmanager
    def ahead(self):
        self.parted = self.aside = True
        yield
        self.aside = False

    def join(self):
        sides = self.touched["main"], self.touched["side"]
        for one in sides[0]:
            for other in sides[1]:
                if (one[0] or other[0]) and one[1] < other[2] and other[1] < one[2]:
                    self.shared.append((one[3], other[3]))
        self.windows += all(sides)
        self.parted, self.touched = False, {"main": [], "side": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.kept.append((args, kwargs, found))
        if self.parted and not func.is_view:
            lane = self.touched["side" if self.aside else "main"]
            arguments = func._schema.arguments
            given = dict(zip([one.name for one in arguments], args)) | (kwargs or {})
            for argument in arguments:
                lane += self._of(given.get(argument.name), argument, func)
        return found

    def _of(self, given, argument, func):
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                yield written, *span(tensor), func.name()


def traffic(name, **changes):
    lanes = Traffic()
    options = dict(slots=2, capacity=400, lanes=lanes)
    with Batch(build("llama"), small(name, prefetch="layer", **changes), **options) as batch:
        slots = [batch.join(prompt(length))[0] for length in (150, 70)]
        batch.step(dict.fromkeys(slots, 3))
        with lanes:
            batch.step(dict.fromkeys(slots, 5))
    assert lanes.windows == 2  # the second and the third layer are fetched ahead
    return lanes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("headrace", dict(tail=True, keys="int8", values="int4")),
        ("shadowkv", {}),
        ("a2ats", {}),
        ("quest", {}),
        ("pqcache", {}),
    ],
)
def test_lanes_share_nothing_that_one_of_them_writes(name, changes):
    assert not traffic(name, **changes).shared


def test_what_they_share_is_found(monkeypatch):
    """Fetched for the layer that computes at the same time."""
    ahead = DeviceBatch._ahead
    monkeypatch.setattr(
        DeviceBatch, "_ahead", lambda self, i, *rest: i < 3 and ahead(self, i - 1, *rest)
    )
    assert traffic("headrace").shared
