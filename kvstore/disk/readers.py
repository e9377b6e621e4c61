"""Read transactions that keep LMDB's freed pages from being used again."""

import logging
import threading
from typing import NamedTuple

import lmdb

PATIENCE = 64  # commits
_log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """A read transaction of some process."""

    pid: int
    snapshot: int  # number of the last commit that it sees


class Readers:
    """Watches the transactions that read an environment, of all processes.

    LMDB uses no page again that was freed since the oldest of them began, so its file grows with
    every commit while one hangs. Those of processes that died are ended here; others are named
    in a warning, once, and it is up to the user to end them.
    """

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self._lock = threading.Lock()
        self._named: Reader | None = None
        self.lag = 0  # commits since the oldest one began

    def check(self) -> None:
        """To be called after commits. 10 us for each reader."""
        with self._lock:
            oldest = self._oldest()
            if oldest is not None and self._behind(oldest) > 1 and self._env.reader_check():
                oldest = self._oldest()
            self.lag = 0 if oldest is None else self._behind(oldest)
            if oldest is not None and self.lag > PATIENCE and oldest != self._named:
                self._named = oldest
                _log.warning(
                    "process %d has been reading the store for %d commits: until it ends, "
                    "LMDB's file grows with every commit",
                    oldest.pid,
                    self.lag,
                )

    def _behind(self, reader: Reader) -> int:
        return max(0, int(self._env.info()["last_txnid"]) - reader.snapshot)

    def _oldest(self) -> Reader | None:
        return min(parsed(self._env.readers()), key=lambda r: r.snapshot, default=None)


def parsed(table: str) -> list[Reader]:
    """LMDB's list of readers: those in a transaction. Lines of process, thread and snapshot."""
    rows = [line.split() for line in table.splitlines()]
    return [
        Reader(int(row[0]), int(row[2]))
        for row in rows
        if len(row) == 3 and row[0].isdecimal() and row[2].isdecimal()
    ]
