"""The Redis protocol (RESP2), as far as it is needed: nothing is believed that a server says.

A reply has a deadline as a whole, not each of its pieces: a server that sends a byte now and then
holds nobody up. It is read where it is wanted, and never beyond: no server can fill our memory.
"""

import select
import socket
import time
from collections.abc import Sequence
from typing import TypeAlias

from kvstore.errors import TimedOut, Unreachable

Buffer: TypeAlias = bytes | bytearray | memoryview

_LINE_BYTES = 1024  # longest line of a server that makes sense
_READ_BYTES = 16 << 10  # at once, where a reply may end before
_JOIN_BYTES = 16 << 10  # smaller pieces are sent together


class Refused(str):
    """What a server says instead of an answer."""


def command(*arguments: Buffer) -> list[Buffer]:
    """A command as it is sent, piece by piece; large arguments are not copied."""
    pieces: list[Buffer] = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        pieces += [b"$%d\r\n" % len(argument), argument, b"\r\n"]
    return pieces


def joined(pieces: Sequence[Buffer]) -> list[Buffer]:
    """The same bytes in fewer pieces: a call of the system costs more than a copy of little."""
    runs: list[Buffer] = []
    small = bytearray()
    for piece in pieces:
        if len(piece) < _JOIN_BYTES:
            small += piece
            continue
        runs += [small, piece] if small else [piece]
        small = bytearray()
    return [*runs, small] if small else runs


class Wire:
    """One connected socket, and a deadline for what is going on."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline = time.monotonic()
        self._read = bytearray(_READ_BYTES)
        self._at = self._end = 0  # what of that was received and not used

    def begin(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s

    def is_quiet(self) -> bool:
        """Whether the connection is whole, and nothing came that nobody asked for."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN | select.POLLHUP)
        return self._at == self._end and not poll.poll(0)

    def send(self, pieces: Sequence[Buffer]) -> None:
        for piece in joined(pieces):
            self._settle()
            try:
                self._sock.sendall(piece)
            except OSError as error:
                raise _lost(error) from error

    def status(self) -> Refused | None:
        """None for a command that was carried out."""
        line = self._line()
        if line[:1] == b"-":
            return _refusal(line)
        if line[:1] in b"+:" and line[:1]:
            return None
        raise _nonsense(line)

    def number(self) -> int | Refused:
        line = self._line()
        if line[:1] == b"-":
            return _refusal(line)
        if line[:1] != b":":
            raise _nonsense(line)
        return _count(line)

    def bulk(self, into: memoryview) -> int | Refused:
        """Bytes of a value, which are now in `into`, or were not sent by an honest server."""
        line = self._line()
        if line[:1] == b"-":
            return _refusal(line)
        if line[:1] != b"$":
            raise _nonsense(line)
        count = 0 if line == b"$-1" else _count(line)
        if count > len(into):
            raise Unreachable(f"a value of {count} bytes came where at most {len(into)} may")
        self._fill(into[:count])
        if line != b"$-1" and self._take(2) != b"\r\n":
            raise Unreachable("a value has another length than its head says")
        return count

    def close(self) -> None:
        self._sock.close()

    def _line(self) -> bytes:
        while (end := self._read.find(b"\r\n", self._at, self._end)) < 0:
            if self._end - self._at > _LINE_BYTES:
                raise _nonsense(bytes(self._read[self._at : self._end]))
            self._more()
        line = bytes(self._read[self._at : end])
        self._at = end + 2
        if len(line) > _LINE_BYTES:
            raise _nonsense(line)
        return line

    def _take(self, count: int) -> bytes:
        while self._end - self._at < count:
            self._more()
        self._at += count
        return bytes(self._read[self._at - count : self._at])

    def _fill(self, into: memoryview) -> None:
        done = min(len(into), self._end - self._at)
        into[:done] = self._read[self._at : self._at + done]
        self._at += done
        while done < len(into):
            done += self._receive(into[done:])

    def _more(self) -> None:
        """Receive behind what is there, which moves to the front."""
        self._read[: self._end - self._at] = self._read[self._at : self._end]
        self._at, self._end = 0, self._end - self._at
        self._end += self._receive(memoryview(self._read)[self._end :])

    def _receive(self, into: memoryview) -> int:
        self._settle()
        try:
            count = self._sock.recv_into(into)
        except OSError as error:
            raise _lost(error) from error
        if not count:
            raise Unreachable("the server closed the connection")
        return count

    def _settle(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("no answer in time")
        self._sock.settimeout(left)


def _count(line: bytes) -> int:
    if not line[1:].isdigit() or len(line) > 20:
        raise _nonsense(line)
    return int(line[1:])


def _refusal(line: bytes) -> Refused:
    return Refused(ascii(line[1:].decode("latin-1"))[1:-1])


def _lost(error: OSError) -> Unreachable:
    if isinstance(error, TimeoutError):
        return TimedOut("no answer in time")
    return Unreachable(f"the connection is lost: {error}")


def _nonsense(line: bytes) -> Unreachable:
    return Unreachable(f"this is no answer of a Redis server: {line[:60]!r}")
