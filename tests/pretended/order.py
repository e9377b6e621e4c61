"""Which work on the GPU comes before which, whatever it takes: that which is not in order races.

A stream's work comes one after the other; of two streams, and of a stream and the host, only what
events, waits and copies that return at their end put in order. Work races where two of it touch
the same four bytes in no order, and one of them writes; and where memory is given back on the
stream it came from while another may still use it, whom `record_stream` did not name. The host is
one: what a thread waited for is known to all.
"""

import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRAIN = 4  # bytes that are one
LINES = 256  # beyond them streams share one
LOCK = threading.RLock()
RACES: list[str] = []  # of memory that was given back: raised when the test ends


Touched: TypeAlias = "tuple[Memory, Any]"  # and its grains
MAKES = ("aten::empty", "aten::zeros", "aten::ones", "aten::full", "aten::new_", "aten::rand")
NOT_OURS = ("tests.pretended", "torch", "triton", "jaxtyping", "contextlib", "threading")


class Race(AssertionError):
    """Work on a GPU whose order nobody enforced."""


class Line:
    """A stream, or the host: what is known there to have happened, by counts of lines' work."""

    every: ClassVar["list[Line]"] = []

    def __init__(self) -> None:
        self.number = len(Line.every)
        self.known = np.zeros(LINES, np.int32)
        self._work = ["nothing"]  # by its count
        Line.every.append(self)

    def learn(self, known: NDArray[np.int32]) -> None:
        """That all of this has happened."""
        with LOCK:
            np.maximum(self.known, known, out=self.known)

    def begin(self, work: str) -> int:
        """Its count."""
        self._work.append(sys.intern(work))
        self.known[self.number] += 1
        return int(self.known[self.number])

    def work(self, count: int) -> str:
        return f"{self._work[count]} on {'the host' if self is HOST else f'stream {self.number}'}"


HOST, FIRST = Line(), Line()


class Memory:
    """An allocation: by its grains, who wrote and who read last.

    Args:
        owner: the stream that it comes from, and goes back to.
    """

    def __init__(self, first: int, nbytes: int, owner: Line | None) -> None:
        self.first, self.nbytes, self.owner = first, nbytes, owner
        self._size = nbytes // GRAIN + 1
        self._writer = np.zeros(self._size, np.int16)
        self._written = np.zeros(self._size, np.int32)
        self._read: dict[int, NDArray[np.int32]] = {}  # by lines
        self._last: dict[int, int] = {}  # work of each line that touched it
        self.named: set[int] = set()  # lines that it waits for

    def touch(self, grains: Any, line: Line, now: int, writes: bool) -> None:
        """Raises Race."""
        if any(count > line.known[number] for number, count in self._last.items()):
            self._find(line, now, "wrote", self._writer[grains], self._written[grains])
            for other, read in self._read.items() if writes else ():
                self._find(line, now, "reads", np.array(other), read[grains])
        if line is HOST:
            return
        self._last[line.number] = now
        if writes:
            self._writer[grains], self._written[grains] = line.number, now
            return
        if line.number not in self._read:
            self._read[line.number] = np.zeros(self._size, np.int32)
        self._read[line.number][grains] = now

    def _find(self, line: Line, now: int, did: str, who: Any, when: Any) -> None:
        early = np.flatnonzero(when > line.known[who])
        if len(early):
            at = early[0]
            other, count = Line.every[np.broadcast_to(who, when.shape)[at]], when[at]
            raise Race(
                f"{line.work(now)} is in no order with {other.work(count)}, "
                f"which {did} the same memory"
            )

    def used(self, known: NDArray[np.int32]) -> list[str]:
        """Work that touched it and is not known to be done."""
        last = [(number, n) for number, n in self._last.items() if number not in self.named]
        return [Line.every[number].work(n) for number, n in last if n > known[number]]

    def give_back(self) -> None:
        """Note a race with whoever uses it."""
        if self.owner is not None:
            known = np.maximum(self.owner.known, HOST.known)
            known[self.owner.number] = np.iinfo(np.int32).max
            of = "the host" if self.owner is HOST else f"stream {self.owner.number}"
            RACES.extend(f"{work} may use memory of {of} given back" for work in self.used(known))

    __del__ = give_back


def grains(x: Tensor, memory: Memory) -> Any:
    """An index of those that a tensor lies on."""
    steps = sorted((step, n) for n, step in zip(x.shape, x.stride(), strict=True) if n > 1 and step)
    run, size = 1, x.element_size()
    while steps and steps[0][0] <= run:
        step, n = steps.pop(0)
        run += step * (n - 1)
    starts = np.array([x.data_ptr() - memory.first])
    for step, n in steps:
        starts = (starts[:, None] + np.arange(n) * (step * size)).ravel()
    first, last = starts // GRAIN, (starts + run * size - 1) // GRAIN
    if len(starts) == 1:
        return slice(first[0], last[0] + 1)
    width = int((last - first).max()) + 1
    return np.minimum(first[:, None] + np.arange(width), last[:, None]).ravel()


class Accesses(TorchDispatchMode):
    """What operations inside read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Tensor] = []
        self.writes: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {} if kwargs is None else kwargs
        made = func(*args, **given)
        reads, writes = [], []
        for i, at in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else given.get(at.name)
            changed = at.alias_info is not None and at.alias_info.is_write
            (writes if changed else reads).extend(_tensors(value))
        there = {x.untyped_storage()._cdata for x in reads + writes}
        new = [x for x in _tensors(made) if x.untyped_storage()._cdata not in there]
        if writes or new:  # else it is a view
            self.reads += [] if func._schema.name.startswith(MAKES) else reads
            self.writes += writes + new
        elif not _tensors(made):
            self.reads += reads
        return made


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def happens(name: str, reads: Iterable[Touched], writes: Iterable[Touched], line: Line) -> None:
    """Work on a stream, or done by the host. Raises Race."""
    with LOCK:
        line.learn(HOST.known)
        now = line.begin(f"{name} of {place()}")
        for memory, at in reads:
            memory.touch(at, line, now, False)
        for memory, at in writes:
            memory.touch(at, line, now, True)


def place() -> str:
    """The line of the project that asked for this."""
    frame = sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(NOT_OURS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
