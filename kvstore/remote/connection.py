"""One connection to a Redis server, from its first byte within a deadline."""

import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvstore.errors import StoreError, TimedOut, Unreachable
from kvstore.remote.address import Address
from kvstore.remote.wire import Buffer, Refused, Wire, command

Place = tuple[socket.AddressFamily, Any]  # what a socket connects to


def resolved(address: Address) -> list[Place]:
    """Where the server may be reached, best first. May take long: a name server is asked."""
    if address.port is None:
        return [(socket.AF_UNIX, address.host)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a name may be none
        raise Unreachable(f"no address for {address.host}: {error}") from error
    return [(family, place) for family, _, _, _, place in found]


def tls_context(address: Address, ca_file: str | None) -> ssl.SSLContext | None:
    """How to make sure that the server is the one that the URL names. StoreError."""
    if not address.tls:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file and Path(ca_file))
    except OSError as error:
        raise StoreError(f"cannot read remote.ca_file {ca_file}: {error}") from error


def connected(
    places: Sequence[Place], address: Address, tls: ssl.SSLContext | None, timeout_s: float
) -> Wire:
    """A connection to the first place that takes it, logged in. Raises Unreachable."""
    deadline = time.monotonic() + timeout_s
    error: Unreachable = Unreachable(f"no address for {address.host}")
    for left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        now = time.monotonic()
        until = now + (deadline - now) / left  # one that swallows packets leaves the others some
        try:
            with ExitStack() as opened:
                sock = opened.enter_context(_socket(family))
                wire = _opened(sock, place, address, tls, until)
                opened.pop_all()
            return wire
        except Unreachable as problem:
            if not isinstance(error, TimedOut):  # which costs most, so that is what it counts as
                error = problem
    raise error


def _socket(family: socket.AddressFamily) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:  # no more files may be open, for one
        raise Unreachable(f"no connection: {error}") from error


def _opened(
    sock: socket.socket,
    place: Any,
    address: Address,
    tls: ssl.SSLContext | None,
    deadline: float,
) -> Wire:
    try:
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        sock.connect(place)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname=address.host)
    except TimeoutError as error:
        raise TimedOut("no connection in time") from error
    except OSError as error:
        raise Unreachable(f"no connection: {error}") from error
    wire = Wire(sock)
    wire.begin(max(deadline - time.monotonic(), 1e-3))
    _log_in(wire, address)
    return wire


def _log_in(wire: Wire, address: Address) -> None:
    commands: list[list[Buffer]] = []
    if address.password is not None:
        names = [address.user.encode()] if address.user is not None else []
        commands.append(command(b"AUTH", *names, address.password.encode()))
    if address.db:
        commands.append(command(b"SELECT", str(address.db).encode()))
    for pieces in commands:
        wire.send(pieces)
        if isinstance(refusal := wire.status(), Refused):
            raise Unreachable(f"{str(pieces[2], 'ascii')} was refused: {refusal}")
