"""The access log's way out: a thread writes, so that who reads slowly does not hold up requests."""

import logging
import queue
import sys
import threading
from typing import IO

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
        self._thread = threading.Thread(target=self._write, name="headrace-access", daemon=True)
        self._thread.start()
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Have a line written, unless too many wait."""
        try:
            self._lines.put_nowait(record.getMessage())
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what is left, if there is somebody to take it."""
        try:
            self._lines.put_nowait(None)
        except queue.Full:
            self.lost += 1
        self._thread.join(LAST_S)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                print(line, file=self._out, flush=True)
            except (OSError, ValueError):  # whoever read it has gone
                return
        if self._out is not sys.stdout:
            self._out.close()


def _opened(where: str) -> IO[str]:
    if where == "-":
        return sys.stdout
    try:
        return open(where, "a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write serve.access_log {where}: {error.strerror}") from error
