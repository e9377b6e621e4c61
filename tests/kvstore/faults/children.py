"""Forked children that do one thing to a store, and what became of them.

The parent imports torch once and never opens a store itself, so a child takes milliseconds.
"""

import json
import os
import signal
import sys
import traceback
from typing import NamedTuple

LIMIT_S = 60  # a child that takes longer has stalled: it takes milliseconds
FAILED = 1  # exit status of a child that raised


class Ended(NamedTuple):
    """A child that is no more."""

    code: int  # exit status, or minus the signal
    said: list  # in order
    peak_bytes: int  # resident, at most

    @property
    def stalled(self):
        return self.code == -signal.SIGALRM


class Child:
    """Does work(say, *args) in a process of its own; what it says can be any JSON."""

    def __init__(self, work, *args, limit_s=LIMIT_S):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reader)
            _live(work, args, writer, limit_s)
        os.close(writer)
        self._pipe = os.fdopen(reader)
        self._said = []

    def hear(self):
        """The next that it says; None if it is dead."""
        line = self._pipe.readline()
        if not line.endswith("\n"):
            return None
        self._said.append(json.loads(line))
        return self._said[-1]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def join(self):
        """Wait for its end."""
        while self.hear() is not None:
            pass
        self._pipe.close()
        _, status, usage = os.wait4(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self._said, usage.ru_maxrss * 1024)


def ended(work, *args, limit_s=LIMIT_S):
    return Child(work, *args, limit_s=limit_s).join()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def _live(work, args, pipe, limit_s):
    def say(what):
        os.write(pipe, (json.dumps(what) + "\n").encode())

    code = FAILED
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit_s)
        work(say, *args)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
