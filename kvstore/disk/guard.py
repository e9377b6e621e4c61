"""A map whose file may be cut short, or fail to be read, under a process that reads it."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import CorruptRecord
from native.library import library

SOURCE = Path(__file__).with_suffix(".c")


class Guard:
    """Makes of a SIGBUS in this process's map of a file blank pages, and an error for their reader.

    Installs a signal handler for the process, which passes on what happens elsewhere: a handler
    that is installed later and passes nothing on takes the guard away. Where there is no C
    compiler nothing is guarded.

    `whole` marks a stretch of reads. One that met a blank page raises, and so do those of other
    threads that overlapped with it. The next one finds the file's own pages again.
    """

    def __init__(self, path: Path, place: tuple[int, int] | None = None) -> None:
        """`path`: of a file that this process maps whole, from its start.

        Args:
            place: the addresses of that map; found by the path if there is no other.
        """
        self._file = path.open("rb", buffering=0)
        self._code = library(SOURCE)
        self._lock = threading.Lock()
        self._renewed = 0  # how many faults there were when the map was last whole
        self._count, self._place = ctypes.c_uint64(), -1
        self.start, self.end = place or _mapped(self._file.fileno())
        if self._code is not None and self.end and self._code.guard_install() == 0:
            start, end = ctypes.c_size_t(self.start), ctypes.c_size_t(self.end)
            self._place = self._code.guard_add(start, end)
            self._code.guard_count.restype = ctypes.c_size_t
            if self.guards:
                self._count = ctypes.c_uint64.from_address(self._code.guard_count(self._place))

    @property
    def guards(self) -> bool:
        """Whether there is anything but the file's length to keep a read from SIGBUS."""
        return self._place >= 0

    @property
    def faults(self) -> int:
        """Blank pages that reads met."""
        return self._count.value

    @contextmanager
    def whole(self) -> Iterator[int]:
        """Reads of the map; CorruptRecord if one met a blank page. Yields what `check` wants."""
        seen = self.renew()
        try:
            yield seen
        finally:
            self.check(seen)  # rather than whatever error came of it

    def check(self, seen: int) -> None:
        """Raise CorruptRecord if reads up to now met a blank page."""
        if self.faults != seen:
            raise CorruptRecord("the data file was cut short, or failed to be read, meanwhile")

    def close(self) -> None:
        """Before the map goes: its addresses may become another's."""
        if self._place >= 0 and self._code is not None:
            self._code.guard_drop(self._place)
            self._count, self._place = ctypes.c_uint64(), -1
        self._file.close()

    def renew(self) -> int:
        """Let reads find the file's own pages again; what `check` wants. 1 us."""
        if self.faults != self._renewed and self._code is not None:
            with self._lock:
                faults = self.faults  # counted before: those that come now are another's
                if self._code.guard_renew(self._place, self._file.fileno()) == 0:
                    self._renewed = faults
        return self._renewed


def _mapped(file: int) -> tuple[int, int]:
    """The addresses of this process's shared map of an open file; (0, 0) if unknown.

    Found by its path: the device that a map names is not always the file's.
    """
    try:
        path = os.readlink(f"/proc/self/fd/{file}")
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).split("\n")[:-1]
    except OSError:
        return 0, 0
    for line in lines:
        addresses, access, offset, _, _, *name = line.split(maxsplit=5)
        if name == [path] and access.endswith("s") and int(offset, 16) == 0:
            start, end = (int(address, 16) for address in addresses.split("-"))
            return start, end
    return 0, 0
