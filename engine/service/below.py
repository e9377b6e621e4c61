"""What requests have below the device, within budgets: in host memory, and on disk behind it."""

from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from engine.service.slab import SlabCache
from engine.service.swap_file import OnDisk, SwapFile
from kvstore.errors import CorruptRecord

MOST_COPIES = 8  # in which a request comes back
DISK_COPIES = 4  # of these: for up to 4096 tokens that are on disk


@dataclass(slots=True)
class SwapStats:
    """What was moved. A copy takes any number of tokens, in all layers, from or to the device."""

    outs: int = 0
    backs: int = 0
    copies_out: int = 0
    copies_back: int = 0
    bytes_out: int = 0
    bytes_back: int = 0
    disk_bytes_written: int = 0
    disk_bytes_read: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """KV of some tokens of a request in host memory, contiguous."""

    start: int
    data: Float[Tensor, "L 2 Hk n D"]

    @property
    def stop(self) -> int:
        return self.start + self.data.shape[3]


@dataclass(slots=True, eq=False)
class Copies:
    """What there is of a request below the device, whether it is out or runs.

    [0, disk.tokens) on disk   [disk.tokens, tokens) in segments   [tokens, ...) not copied
    """

    disk: OnDisk = field(default_factory=OnDisk)
    segments: list[Segment] = field(default_factory=list)
    coming: "Future[None] | None" = None
    lost: CorruptRecord | None = None

    @property
    def tokens(self) -> int:
        return self.segments[-1].stop if self.segments else self.disk.tokens

    @property
    def moves(self) -> bool:
        """Whether a thread reads it."""
        return self.coming is not None and not self.coming.done()


class Below:
    """Copies of all requests, and how one makes room for another.

    First those of requests that run are dropped, from the end of a request; then what has been out
    longest goes to disk, from the start of a request.

    Args:
        host_bytes: of all segments; who makes one asks for room before, and counts it after.
    """

    def __init__(self, host_bytes: int, file: SwapFile | None) -> None:
        self.host_bytes, self.file = host_bytes, file
        self.used_bytes = 0
        self.stats = SwapStats()
        self.copies: dict[SlabCache, Copies] = {}  # who went out last comes last

    def most(self, on_disk: int) -> int:
        """Segments that a request may have beside so many tokens on disk."""
        copies = 0 if self.file is None else self.file.copies(on_disk)
        return MOST_COPIES - min(copies, DISK_COPIES)

    def make_room(self, nbytes: int, keep: Copies) -> bool:
        """Have so much host memory free; False if there is not, whatever others give up."""
        if nbytes > self.host_bytes:
            return False
        while self.host_bytes - self.used_bytes < nbytes:
            if not (self._drop(keep) or self._lower(keep) or self.wait()):
                return False
        return True

    def make_space(self, pieces: int, keep: Copies) -> bool:
        """Have so many pieces on disk free; False if those that run have none to give up."""
        if self.file is None:
            return False
        while self.file.free < pieces:
            copies = next((x for x in self._running(keep) if x.disk.tokens), None)
            if copies is None:
                return False
            self.free(copies.segments)
            self.file.shorten(copies.disk)
        return True

    def wait(self) -> bool:
        """Until a request is back, which then runs; False if none is on its way."""
        coming = next((x.coming for x in self.copies.values() if x.moves), None)
        if coming is None:
            return False
        wait([coming])
        return True

    def free(self, segments: list[Segment]) -> None:
        """Of one request; the list is empty afterwards."""
        self.used_bytes -= sum(segment.data.nbytes for segment in segments)
        segments.clear()

    def free_all(self, copies: Copies) -> None:
        """Of one request, on disk, too."""
        self.free(copies.segments)
        if self.file is not None:
            self.file.free_all(copies.disk)

    def check(self) -> None:
        """AssertionError unless all that is kept is accounted for."""
        parts = [part for copies in self.copies.values() for part in copies.segments]
        assert sum(part.data.nbytes for part in parts) == self.used_bytes <= self.host_bytes
        for cache, copies in self.copies.items():
            stops = [copies.disk.tokens, *(part.stop for part in copies.segments)]
            assert stops[:-1] == [part.start for part in copies.segments], "a gap"
            assert copies.tokens <= cache.length, "more than there is"
            assert len(copies.segments) <= self.most(copies.disk.tokens), "too many copies"
            complete = cache.loaded or copies.lost or copies.tokens == cache.length
            assert complete, "a request that is out lacks tokens"
        if self.file is not None:
            self.file.check(copies.disk for copies in self.copies.values())

    def _drop(self, keep: Copies) -> bool:
        """Free the last segment of a request that runs."""
        for copies in self._running(keep):
            if copies.segments:
                self.free([copies.segments.pop()])
                return True
        return False

    def _lower(self, keep: Copies) -> bool:
        """Move the first segment of a request that is out to disk, and more if it has too many."""
        for cache, copies in self.copies.items():
            if self.file is None or copies.moves or cache.loaded or not copies.segments:
                continue
            left = range(len(copies.segments))[::-1]
            stops = zip(left, [part.stop for part in copies.segments], strict=True)
            stop = next(stop for many, stop in stops if many <= self.most(stop))
            if self.make_space(self.file.pieces(stop) - len(copies.disk.numbers), keep):
                self._lower_to(self.file, copies, stop)
                return True
        return False

    def _lower_to(self, file: SwapFile, copies: Copies, stop: int) -> None:
        try:
            while copies.disk.tokens < stop:
                part = copies.segments[0]
                written = file.extend(copies.disk, part.data, part.start, part.stop)
                self.stats.disk_bytes_written += written
                self.free([copies.segments.pop(0)])
        except CorruptRecord as error:
            copies.lost = error  # told to whoever asks for it; the others need the room
            self.free_all(copies)

    def _running(self, keep: Copies) -> Iterator[Copies]:
        """Requests whose copies are no more than that."""
        for cache, copies in self.copies.items():
            if cache.loaded and not copies.moves and copies is not keep:
                yield copies
