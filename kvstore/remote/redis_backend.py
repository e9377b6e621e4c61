"""Values in a Redis or Valkey server, or whatever speaks their protocol."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvstore.errors import StoreError, Unreachable
from kvstore.remote.address import parse_url
from kvstore.remote.config import RemoteConfig
from kvstore.remote.connection import Place, connected, resolved, tls_context
from kvstore.remote.wire import Buffer, Refused, Wire, command

IDLE = 8  # connections kept for the next call
KIND, KINDS = 16, 16  # letters of a kind of refusal, and how many kinds are logged
_WRONG_TYPE = "WRONGTYPE"  # somebody else's value under our name
_log = logging.getLogger(__name__)
T = TypeVar("T")


class RedisBackend:
    """Every call is one pipelined exchange over a connection of its own.

    No command names keys of two blocks, so a cluster's proxy may split a call as it likes. A
    value is read with GETRANGE: the server itself then sends no more than we have room for.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._address = parse_url(config.url)
        self._tls = tls_context(self._address, config.ca_file)
        self._timeout_s, self._connect_timeout_s = config.timeout_s, config.connect_timeout_s
        self._ttl = str(config.ttl_s).encode()
        self._places: list[Place] = []
        self._idle: list[Wire] = []  # the one used last is the last
        self._closed = False
        self._lock = threading.Lock()  # guards both
        self._pid = os.getpid()
        self._refusals: set[str] = set()  # logged

    def __str__(self) -> str:
        return str(self._address)

    def resolve(self) -> None:
        self._places = resolved(self._address)

    def exists_many(self, names: Sequence[bytes]) -> list[bool]:
        sent = [piece for name in names for piece in command(b"EXISTS", name)]
        return self._exchange(sent, lambda w: [_answer(w.number()) == 1 for _ in names])

    def get_many(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[int]:
        sent: list[Buffer] = []
        for name, buffer in zip(names, into, strict=True):
            sent += command(b"GETRANGE", name, b"0", str(len(buffer) - 1).encode())
        return self._exchange(sent, lambda wire: [_size(wire.bulk(buffer)) for buffer in into])

    def put_many(self, values: Sequence[tuple[bytes, Buffer]]) -> list[bool]:
        sent: list[Buffer] = []
        for name, value in values:
            sent += command(b"SET", name, value, b"EX", self._ttl)
        replies = self._exchange(sent, lambda wire: [wire.status() for _ in values])
        for refusal in filter(None, replies):
            self._note(refusal)
        return [reply is None for reply in replies]

    def delete(self, names: Sequence[bytes]) -> None:
        self._exchange(command(b"UNLINK", *names), lambda wire: _answer(wire.number()))

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for wire in idle:
            wire.close()

    def _exchange(self, sent: Sequence[Buffer], read: Callable[[Wire], T]) -> T:
        """Send, and read what comes back; a connection that failed is never used again."""
        wire = self._connection()
        try:
            wire.begin(self._timeout_s)
            wire.send(sent)
            answer = read(wire)
        except BaseException:
            wire.close()
            raise
        with self._lock:
            if len(self._idle) < IDLE and not self._closed:
                self._idle.append(wire)
                return answer
        wire.close()
        return answer

    def _connection(self) -> Wire:
        if os.getpid() != self._pid:
            raise StoreError("the shared tier was opened before a fork: open it in the child")
        while True:
            with self._lock:
                if not self._idle:
                    break
                wire = self._idle.pop()
            if wire.is_quiet():
                return wire
            wire.close()  # the server went, and may be back
        return connected(self._places, self._address, self._tls, self._connect_timeout_s)

    def _note(self, refusal: Refused) -> None:
        kind = refusal.split(" ")[0][:KIND]
        if kind not in self._refusals and len(self._refusals) < KINDS:
            self._refusals.add(kind)
            _log.warning("the server at %s takes no blocks: %s", self, refusal)


def _answer(reply: int | Refused) -> int:
    if isinstance(reply, Refused):
        raise Unreachable(f"the server refuses: {reply}")
    return reply


def _size(reply: int | Refused) -> int:
    if isinstance(reply, Refused) and reply.startswith(_WRONG_TYPE):
        return 0
    return _answer(reply)
