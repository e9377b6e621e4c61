"""What a user may set about the shared tier."""

import os

import msgspec

from kvstore.errors import StoreError
from kvstore.remote.address import parse_url

LONGEST_S = 86_400  # a day
SECRET_BYTES = 16  # at least: whoever guesses the secret can plant KV


class RemoteConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Redis or Valkey server that machines share blocks through.

    Args:
        url: redis://HOST[:PORT][/DB], rediss://... for TLS, or unix:///PATH[?db=DB]; USER:PASSWORD@
            may stand before the host. A host's name is looked up in the background.
        secret_env: the environment variable that holds the secret of those who share blocks.
            Nobody without it, not even with a password of the server, can plant KV.
        namespace: start of the names of all values, for servers that hold other things too.
        ttl_s: seconds after which the server forgets a block, counted from when it was written.
        timeout_s: longest wait for one answer, of at most 8 MiB. Then the server is set aside, and
            all it may have is a miss, until it answers again.
        connect_timeout_s: longest wait for a connection.
        retry_s: how long a server is set aside before it is tried again, in the background.
        queue_bytes: of blocks that wait to be sent; what does not fit is not sent.
        ca_file: certificates to trust with rediss://, in PEM; None for the system's.
    Raises:
        ValueError: for a URL of another form, or a number that is not positive, or absurd.
    """

    url: str
    secret_env: str = "HEADRACE_REMOTE_SECRET"
    namespace: str = "headrace"
    ttl_s: int = 86_400
    timeout_s: float = 1.0
    connect_timeout_s: float = 0.25
    retry_s: float = 5.0
    queue_bytes: int = 256 << 20
    ca_file: str | None = None

    def __post_init__(self) -> None:
        parse_url(self.url)
        for name in ("ttl_s", "timeout_s", "connect_timeout_s", "retry_s", "queue_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"remote.{name} must be positive, got {getattr(self, name)}")
        for name in ("timeout_s", "connect_timeout_s", "retry_s"):
            if not getattr(self, name) <= LONGEST_S:
                raise ValueError(
                    f"remote.{name} must be at most {LONGEST_S} seconds, got {getattr(self, name)}"
                )
        if set("{}\r\n") & set(self.namespace):  # braces say which part of a name a cluster hashes
            raise ValueError(f"remote.namespace must be without braces, got {self.namespace!r}")

    def __repr__(self) -> str:
        """Without the URL, in which a password may stand."""
        return f"RemoteConfig({parse_url(self.url)})"

    def secret(self) -> bytes:
        """The shared secret. Raises StoreError if there is none worth the name."""
        secret = os.fsencode(os.environ.get(self.secret_env, ""))
        if len(secret) < SECRET_BYTES:
            raise StoreError(
                f"a shared tier needs a secret of at least {SECRET_BYTES} bytes in the environment "
                f"variable {self.secret_env}, the same on all machines, got {len(secret)}; make "
                'one with: python -c "import secrets; print(secrets.token_hex(32))"'
            )
        return secret
