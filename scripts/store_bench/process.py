"""The process in which LMCache runs, and what it answers."""

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

SCRIPTS = Path(__file__).resolve().parent.parent


class WorkerFailed(Exception):
    """The other side of the comparison ended, or answered nonsense; says where its log is."""


class Process:
    """A worker that answers every line of JSON with one."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start it and wait until it is ready, which it says with facts about itself."""
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, bufsize=0,
                env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
            )  # fmt: skip
        self.about = self._answer()

    def seconds(self, what: str) -> float:
        """Have it do a round: how long that took there. Raises WorkerFailed for wrong values."""
        with suppress(BrokenPipeError):  # its answer, or the lack of one, says more
            self._pipe(self._process.stdin).write(json.dumps({"do": what}).encode() + b"\n")
        answer = self._answer()
        if not answer["right"]:
            raise WorkerFailed(f"{what}: what was read is not what was stored")
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        line = self._pipe(self._process.stdout).readline()
        try:
            answer = json.loads(line)
        except ValueError:
            end = "".join(self._log.read_text().splitlines(keepends=True)[-5:])
            raise WorkerFailed(f"the worker said {line!r}; the end of its log:\n{end}") from None
        return dict(answer)

    def _pipe(self, pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe(self._process.stdin).close()
        self._pipe(self._process.stdout).close()
