"""Where a Redis server is, as people write it."""

from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

PORT = 6379
_FORMS = "redis://HOST[:PORT][/DB], rediss://HOST[:PORT][/DB] (TLS) or unix:///PATH[?db=DB]"


@dataclass(frozen=True, slots=True)
class Address:
    """A server, and who we are to it."""

    host: str  # or the path of a socket
    port: int | None  # None for a socket of this machine
    tls: bool = False
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """The address that a URL names; user and password may stand before an `@`.

    Raises:
        ValueError: for a URL of another form. Passwords do not show in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text may hold the URL
        raise _refused("host or port make no sense") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise _refused(f"got {parts.scheme or 'none'} in the place of redis, rediss or unix")
    user = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    if user is not None and password is None:
        raise _refused("a user without a password")
    if parts.scheme == "unix":
        path = unquote(parts.path)
        if parts.hostname or not path.strip("/"):
            raise _refused("unix:// needs the whole path of a socket")
        return Address(path, None, False, _unix_db(parts), user, password)
    if not parts.hostname or parts.query or parts.fragment:
        raise _refused("no host, or something behind the database")
    db = _number(parts.path.strip("/") or "0")
    return Address(parts.hostname, port or PORT, parts.scheme == "rediss", db, user, password)


def _unix_db(parts: SplitResult) -> int:
    options = parse_qs(parts.query)
    if options.keys() - {"db"}:
        raise _refused("the only option of a socket is db")
    return _number(options.get("db", ["0"])[-1])


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _refused("a database is a number")
    return int(text)


def _refused(reason: str) -> ValueError:
    return ValueError(f"url must be {_FORMS}: {reason}")
