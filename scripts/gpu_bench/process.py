"""Parts of a check as processes with a time limit, whose last words are not lost."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STICKY = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")
GRACE_S = 10  # for whoever is asked to end
TAIL = 400  # characters of what a process said last
_RUNNING = set[subprocess.Popen[str]]()  # what `run` waits for, in any thread
_OVER = threading.Event()


@dataclass(frozen=True, slots=True)
class Done:
    """How a process ended: `code` is None if its time was up."""

    code: int | None
    out: str
    err: str

    @property
    def why(self) -> str:
        """In a few words, for one that failed."""
        if self.code is None:
            return "its time was up"
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        return f"exit status {self.code}: {' '.join(lines[-3:])[-TAIL:]}"


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Done:
    """Run it in the project's folder; what it printed is kept in every case."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        given = {**os.environ, **(env or {})}
        process = subprocess.Popen(
            command, cwd=ROOT, env=given, stdout=out, stderr=err, process_group=0
        )
        _RUNNING.add(process)
        if _OVER.is_set():
            _kill(process)
        code = _waited(process, limit_s)
        out.seek(0)
        err.seek(0)
        return Done(code, out.read(), err.read())


def _waited(process: subprocess.Popen[str], limit_s: float) -> int | None:
    """Its exit status; None where its time was up.

    It is asked to end then, as by a terminal, so that pytest writes its report; what it has started
    and left behind ends with it, or it would hold the device while others are timed.
    """
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return None
    finally:
        _kill(process)
        process.wait()
        _RUNNING.discard(process)


def end_all() -> None:
    """End what any thread has started by `run`, and at once what one starts from now on."""
    _OVER.set()
    for process in list(_RUNNING):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def bench(part: str, limit_s: float, *, dry: bool) -> list[dict[str, Any]]:
    """Lines of a part of bench_gpu.py. Whoever breaks the device is left out of the next try."""
    end, found = time.monotonic() + limit_s, list[dict[str, Any]]()
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, "scripts/bench_gpu.py", part, "--json", "--short"]
        command += ["--dry-run"] if dry else []
        skipped = sorted({line["name"] for line in found})
        done = run([*command, "--skip", *skipped] if skipped else command, left)
        lines = parsed(done.out)
        broken = next((i for i, line in enumerate(lines) if sticky(line)), None)
        if broken is None or part != "kernels":
            return found + lines + ([] if done.code in (0, 1) else [_ended(part, done)])
        found += [*lines[: broken + 1]]
    return [*found, _ended(part, Done(None, "", ""))]


def _ended(part: str, done: Done) -> dict[str, Any]:
    return {"part": part, "name": "all", "error": done.why}


def sticky(line: dict[str, Any]) -> bool:
    """Whether a fault is one after which a process cannot use the device."""
    return any(word in line.get("error", "") for word in STICKY)


def parsed(out: str) -> list[dict[str, Any]]:
    """The JSON lines of what was printed; the last may have been cut off."""
    found = []
    for line in out.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return found


def driver() -> str:
    """Version of the GPU's driver; empty where nobody says."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return run(query, 20).out.strip()
    except OSError:
        return ""
