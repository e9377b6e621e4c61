"""The access log's way out: a thread writes, so that who reads slowly does not hold up requests."""

import io
import logging
import os
import queue
import select
import sys
import threading
from contextlib import suppress

from engine.errors import ConfigError

WAITING = 10_000  # lines; of more, some are lost
LAST_S = 1.0  # for the lines that are left at the end


class AccessLog(logging.Handler):
    """Writes messages as lines.

    Args:
        where: a file, to whose end it writes; "-" is standard output.
    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._out = _opened(where)
        self._ended = False
        self.lost = 0
        self._thread = threading.Thread(target=self._write, name="headrace-access", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a line written, unless too many wait."""
        try:
            self._lines.put_nowait(record.getMessage())
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is left, if there is somebody to take it."""
        self._ended = True
        with suppress(queue.Full):  # then the thread is awake, and sees that by itself
            self._lines.put_nowait(None)
        self._thread.join(LAST_S)
        super().close()

    def _write(self) -> None:
        with self._out:
            while not (self._ended and self._lines.empty()):
                if (line := self._lines.get()) is not None:
                    self._put(f"{line}\n".encode())

    def _put(self, data: bytes) -> None:
        try:
            while data:
                written = self._out.write(data)
                if written is None:  # a full pipe that makes nobody wait
                    select.select([], [self._out], [], LAST_S)
                    if self._ended:
                        raise OSError("nobody reads the access log")
                data = data[written or 0 :]
        except OSError:  # whoever read it has gone, or a disk is full
            self.lost += 1


def _opened(where: str) -> io.FileIO:
    """Without a buffer, whose lock a thread that cannot write would keep when the process ends."""
    try:
        if where == "-":
            return io.FileIO(os.dup(sys.stdout.fileno()), "w")
        return io.FileIO(where, "a")
    except OSError as error:
        raise ConfigError(f"cannot write serve.access_log {where}: {error.strerror}") from error
