"""Servers as subprocesses that never outlive this one, and what Linux tells about them."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from serve_bench.client import HOST

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"^ready http://[^:\n]+:(\d+)\n", re.MULTILINE)
START_S = 180.0
STOP_S = 60.0
PR_SET_PDEATHSIG = 1


class ServerFailed(Exception):
    """A server did not start, or did not stop."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=30) as reply:
            return json.load(reply)

    def rss_bytes(self) -> int:
        """Resident memory, mapped files included."""
        return self._memory("VmRSS")

    def anonymous_bytes(self) -> int:
        """Resident memory that no file backs."""
        return self._memory("RssAnon")

    def open_files(self) -> int:
        """File descriptors, sockets included."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024


@contextmanager
def headrace(
    model: str, config: Path, log: Path, extra: Sequence[str] = (), threads: int | None = None
) -> Iterator[Server]:
    """`headrace serve` on a free port of the loopback, until the block ends.

    Raises:
        ServerFailed: it is not ready in time, or does not stop cleanly; its last words are in it.
    """
    command = [sys.executable, "-m", "engine.cli", "serve", "--model", model]
    command += ["--config", str(config), "--host", HOST, "--port", "0", *extra]
    with _started(command, _environment(threads), log) as process:
        yield Server(process, _ready(process, log), log)
        _stop(process, log)


@contextmanager
def transformers(
    model: str, site: Path, log: Path, extra: Sequence[str] = (), threads: int | None = None
) -> Iterator[Server]:
    """`transformers serve` with continuous batching; `site` has what it needs beside our own."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    command += ["--continuous-batching", "--device", "cpu", "--host", HOST, "--port", str(port)]
    environment = _environment(threads) | {"PYTHONPATH": str(site)}
    with _started([*command, *extra], environment, log) as process:
        yield Server(process, _healthy(process, port, log), log)


def _environment(threads: int | None) -> dict[str, str]:
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | chosen


@contextmanager
def _started(
    command: list[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own; the group is gone when the block ends, however it does."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=partial(_die_with_parent, os.getpid()),
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _die_with_parent(parent: int) -> None:
    """In the child: Linux kills it when this process is killed, and cannot clean up."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # killed already, before we had asked for that
        os._exit(1)


def _ready(process: subprocess.Popen[str], log: Path) -> int:
    """The port in the line that says the server takes requests."""
    for _ in _polls(process, log):
        if found := READY.search(log.read_text(errors="replace")):
            return int(found[1])
    raise AssertionError("unreachable")


def _healthy(process: subprocess.Popen[str], port: int, log: Path) -> int:
    for _ in _polls(process, log):
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5).close()
            return port
    raise AssertionError("unreachable")


def _polls(process: subprocess.Popen[str], log: Path) -> Iterator[None]:
    """Again and again until ServerFailed is raised: it ended, or took too long."""
    until, pause = time.monotonic() + START_S, threading.Event()
    while process.poll() is None and time.monotonic() < until:
        yield
        pause.wait(0.1)
    how = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    raise ServerFailed(f"{process.args[:4]} {how}:\n{tail(log)}")  # type: ignore[index]


def _stop(process: subprocess.Popen[str], log: Path) -> None:
    """SIGTERM; the server has to end by itself, and well."""
    process.terminate()
    try:
        status = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        raise ServerFailed(f"still there {STOP_S:g} s after SIGTERM:\n{tail(log)}") from None
    if status != 0:
        raise ServerFailed(f"ended with {status} after SIGTERM:\n{tail(log)}")


def tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
