"""The server in a process: a socket, uvicorn, and a clean end."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from engine.errors import ConfigError
from engine.serve.config import ServeConfig
from engine.serve.protocol import LINGERING, limited
from native.files import room_for

STOPS = (signal.SIGTERM, signal.SIGINT)
QUEUE = 1024  # connections that wait to be taken
AT_ONCE = 16  # of these are taken before any of them is looked at
OWN_FILES = 128 + LINGERING + 8 * AT_ONCE  # beside those of connections that are served
log = logging.getLogger(__name__)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever runs it, and says when it takes requests."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for one in sockets or ():  # which now has a queue no longer than AT_ONCE
            one.listen(QUEUE)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class Server:
    """Serves an application until it is told to stop.

    Args:
        drain: called once when the server is told to stop, in a thread; the server goes on
            answering until it returns.
        at: a socket of `bound`, which is the server's from now on; by default one is made.

    Attributes:
        url: where it is, with the port that was found.

    Raises:
        ConfigError: the address cannot be had, or too few files may be open.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        drain: Callable[[], object],
        at: socket.socket | None = None,
    ) -> None:
        self._drain = drain
        most = _connections(config)
        self._socket = at or bound(config)
        with _address(config):
            self._socket.listen(QUEUE)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._lock = threading.Lock()  # guards what follows
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = False
        self._config = uvicorn.Config(
            app,
            http=limited(config.header_timeout_s, config.send_timeout_s, most),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="error",  # what clients do wrong they are told
            access_log=False,
            backlog=AT_ONCE,  # asyncio's word for both
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=config.header_bytes,
            timeout_keep_alive=max(1, round(config.idle_timeout_s)),
            timeout_graceful_shutdown=1,  # `drain` has waited for those that may end
        )

    def run(self, ready: Callable[[str], None] = lambda url: None, *, signals: bool = True) -> None:
        """Serve until `stop`, or a signal. A second signal does not wait for anything.

        Args:
            ready: called with the address when requests are taken.
            signals: mind SIGTERM and SIGINT; only a main thread can.
        """
        asyncio.run(self._run(ready, signals))

    def stop(self) -> None:
        """End cleanly. For any thread; before `run` has begun and after it has ended, too."""
        with self._lock:
            self._told = True
            if self._loop is not None and self._stopping is not None:
                with suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._stopping.set)

    def close(self) -> None:
        """Give up the address, if `run` has not."""
        self._socket.close()

    async def _run(self, ready: Callable[[str], None], signals: bool) -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._loop, self._stopping = loop, stopping
            if self._told:
                stopping.set()
        if signals:
            for number in STOPS:
                loop.add_signal_handler(number, _signalled, number, stopping)
        server = _Uvicorn(self._config, lambda: ready(self.url))
        serving = asyncio.ensure_future(server.serve([self._socket]))
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await asyncio.to_thread(self._drain)
        stopped.cancel()
        server.should_exit = True
        await serving


def _signalled(number: int, stopping: asyncio.Event) -> None:
    """The first signal ends the server cleanly, the next one at once."""
    if stopping.is_set():
        os._exit(128 + number)
    stopping.set()


def _connections(config: ServeConfig) -> int:
    """How many are served at once: without a file for the next one, nothing works any more."""
    wanted = config.max_connections + OWN_FILES
    files = room_for(wanted)
    if files <= OWN_FILES:
        raise ConfigError(
            f"this process may have {files} files open, and a server needs more than {OWN_FILES}: "
            "raise its limit (ulimit -n)"
        )
    if files < wanted:
        log.warning(
            "%d connections are served at once, not serve.max_connections (%d): this process may "
            "have %d files open; raise its limit (ulimit -n)",
            files - OWN_FILES, config.max_connections, files,
        )  # fmt: skip
    return files - OWN_FILES


@contextmanager
def _address(config: ServeConfig) -> Generator[None]:
    """What the system says of the configured address, said to people."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {config.host}, port {config.port}: {error.strerror}; set serve.host "
            "and serve.port, or --host and --port"
        ) from error


def bound(config: ServeConfig) -> socket.socket:
    """A socket that has the configured address, and takes no connections yet.

    Raises:
        ConfigError: it cannot be had.
    """
    with _address(config), ExitStack() as undo:
        six = ":" in config.host
        made = undo.enter_context(socket.socket(socket.AF_INET6 if six else socket.AF_INET))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if six:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((config.host, config.port))
        undo.pop_all()
    return made
