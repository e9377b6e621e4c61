"""Any order of moves against a plain copy of every request, within budgets that just suffice."""

import tempfile
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.model.pieces import Shape
from engine.service.slab import SlabCache
from engine.service.swap import Swap
from kvstore.pool.spill import Spill

SHAPE = Shape(2, 2, 1, 8, 211, 1 << 20, torch.float32, torch.device("cpu"))
TOKEN = SHAPE.kv_bytes_per_token
LONGEST = 90
KINDS = ["out"] * 5 + ["run"] * 5 + ["back"] * 3 + ["forget"]
MOVE = st.tuples(st.sampled_from(KINDS), st.integers(0, 2), st.integers(1, 12))
MOVES = st.lists(MOVE, min_size=20, max_size=100)  # what, which request, by how much it grows


class Requests:
    """Three requests, what they should hold, and what a scheduler would count."""

    def __init__(self, swap):
        self.swap = swap
        self.caches = [SlabCache(SHAPE, LONGEST) for _ in range(3)]
        self.want = [torch.zeros(2, 2, 1, LONGEST, 8) for _ in range(3)]
        self.coming, self.number = {}, 0

    def apply(self, move, at, count):
        if move == "out" and self.here(at) and self.admitted(at):
            self.swap.out(self.caches[at])
        elif move == "run":
            self.back(at)
            self.arrive(at)
            self.grow(at, min(count, LONGEST - self.caches[at].length))
        elif move == "back":
            self.back(at)
        elif move == "forget":
            self.swap.forget(self.caches[at])
            self.coming.pop(at, None)
            self.caches[at] = SlabCache(SHAPE, LONGEST)

    def back(self, at):
        if not self.caches[at].loaded and at not in self.coming:
            self.coming[at] = self.swap.back(self.caches[at])

    def here(self, at):
        return self.caches[at].loaded and at not in self.coming

    def admitted(self, at):
        """Whether all that are out have room together: those on their way count still."""
        out = [c for i, c in enumerate(self.caches) if not self.here(i)]
        needed = sum(self.swap.cost(c.length) for c in [*out, self.caches[at]])
        return needed <= self.swap.capacity_bytes

    def grow(self, at, count):
        cache, start = self.caches[at], self.caches[at].length
        self.number += 1
        cache.slab[:, :, :, start : start + count] = self.number
        self.want[at][:, :, :, start : start + count] = self.number
        cache.advance(count)

    def arrive(self, at):
        """What is on its way is there, and right."""
        if (coming := self.coming.pop(at, None)) is not None:
            coming.result(60)
            length = self.caches[at].length
            assert torch.equal(
                self.caches[at].slab[..., :length, :], self.want[at][..., :length, :]
            )


@settings(suppress_health_check=list(HealthCheck))
@given(MOVES, st.integers(0, 300), st.integers(0, 80))
def test_what_is_admitted_has_room_and_comes_back_as_it_was(moves, host_tokens, pieces):
    small = dict(PIECE_BYTES=4 * TOKEN, RUN_TOKENS=16)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.multiple("engine.service.swap_file", **small),
    ):
        spill = Spill(Path(folder), pieces * 4096) if pieces else None  # a page a piece
        run(moves, Swap(SHAPE, host_tokens * TOKEN, spill))


def run(moves, swap):
    with closing(swap):
        requests = Requests(swap)
        for move in moves:
            requests.apply(*move)
            swap.check()
        for at in list(requests.coming):
            requests.arrive(at)
        for cache in requests.caches:
            swap.forget(cache)
        swap.check()
        assert swap.used_bytes == 0
