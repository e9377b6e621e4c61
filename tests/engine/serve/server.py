"""Real servers for tests: in this process, and in one of its own."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import openai
import torch

from engine import Engine, EngineConfig
from engine.model.loader import load_module, load_tokenizer
from engine.serve.config import ServeConfig
from engine.serve.running import serving
from engine.service.schedule import ScheduleConfig
from engine.service.service import Service
from kvstore.config import StoreConfig

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "models"
LIMIT_S = 60.0  # for anything to happen; nothing takes so long


class Running:
    """A server in this process, and what is behind it.

    Attributes:
        log: the lines of its access log as they come; waiting for one is waiting for the end of a
            request.
    """

    def __init__(self, url: str, model: str, engine: Engine, service: Service) -> None:
        self.url, self.model, self.engine, self.service = url, model, engine, service
        self.log: Queue[dict[str, Any]] = Queue()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ended(self, **wanted: Any) -> dict[str, Any]:
        """The next line of the access log that has these values."""
        while True:
            line = self.log.get(timeout=LIMIT_S)
            if all(line.get(name) == value for name, value in wanted.items()):
                return line

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """OpenAI's, which does not try again by itself."""
        given = {"max_retries": 0, "timeout": LIMIT_S} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=LIMIT_S
        )

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=LIMIT_S)


@contextmanager
def running(
    model: str = "needle-tiny",
    *,
    store: StoreConfig | None = None,
    schedule: ScheduleConfig | None = None,
    engine: dict[str, Any] | None = None,
    make: Callable[[Engine], Service] = Service,
    **serve: Any,
) -> Generator[Running]:
    """A server on a free port, in a thread.

    Args:
        engine: other settings of the engine.
        make: another service.
        serve: settings of the server.
    """
    config = EngineConfig(
        store=store or StoreConfig(host_bytes=1 << 28),
        schedule=schedule or ScheduleConfig(),
        serve=ServeConfig(**{"port": 0} | serve),
        **engine or {},
    )
    folder = MODELS / model
    module = load_module(folder, dtype=None, device=torch.device("cpu"))
    services: list[Service] = []

    def made_service(engine: Engine) -> Service:
        services.append(make(engine))
        return services[0]

    with (
        Engine(module, load_tokenizer(folder), config, _folder=folder) as made,
        serving(made, model, made_service) as server,
    ):
        found = Running(server.url, model, made, services[0])
        thread = threading.Thread(target=lambda: server.run(signals=False), daemon=True)
        thread.start()
        try:
            with _access_lines(found.log):
                yield found
        finally:
            server.stop()
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "the server does not stop"


class _Lines(logging.Handler):
    def __init__(self, lines: "Queue[dict[str, Any]]") -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(json.loads(record.getMessage()))


@contextmanager
def _access_lines(lines: "Queue[dict[str, Any]]") -> Generator[None]:
    handler, logger = _Lines(lines), logging.getLogger("headrace.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Process:
    """`headrace serve` in a process of its own. Its output does not have to be read.

    Args:
        files: that it may have open.
    """

    def __init__(
        self,
        *args: str,
        config: Path | None = None,
        model: str = "needle-tiny",
        files: int | None = None,
    ) -> None:
        options = [] if config is None else ["--config", str(config)]
        limit = [] if files is None else ["sh", "-c", 'ulimit -n "$0" && exec "$@"', str(files)]
        self._process = subprocess.Popen(
            [
                *limit, sys.executable, "-m", "engine.cli", "serve", "--model", str(MODELS / model),
                "--port", "0", *options, *args,
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self._said: Queue[str | None] = Queue()
        self.stderr: list[str] = []
        self.stdout: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_stderr, daemon=True),
            threading.Thread(target=self._read_stdout, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        line = self._said.get(timeout=LIMIT_S)
        if line is None:
            raise AssertionError(f"the server has ended: {''.join(self.stderr)}")
        self.url = line.split()[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit status."""
        status = self._process.wait(LIMIT_S)
        for reader in self._readers:
            reader.join(LIMIT_S)
        return status

    def stop(self) -> int:
        """End it cleanly; its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self.stderr.append(line)
                if line.startswith("ready "):
                    self._said.put(line)
        self._said.put(None)

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self.stdout.extend(lines)


@contextmanager
def process(*args: str, **options: Any) -> Generator[Process]:
    """`headrace serve` with these options, ended at last."""
    made = Process(*args, **options)
    try:
        yield made
    finally:
        made.kill()
