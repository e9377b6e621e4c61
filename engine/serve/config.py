"""What a user may set of the server: the table `[serve]` of the configuration."""

import ipaddress
import os
import re
from collections.abc import Mapping
from hashlib import sha256

import msgspec

from engine.errors import ConfigError
from kvstore.names import no_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class KeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An API key, and what its owner, a tenant, may do.

    Args:
        key, key_env, key_sha256: one of them: the key itself, the environment variable that holds
            it, or its SHA-256 in hex.
        salt: part of the secret that names the tenant's KV and documents. With a salt the key may
            be replaced by another, and they stay; without one they belong to the key.
        max_concurrent: requests at once.
        requests_per_minute: whatever becomes of them.
        tokens_per_minute: read and generated. A request waits until as many are left as it reads;
            what it generates is counted when it ends, and may be owed.
        document_tokens: of all documents together.
        store_bytes: quota of stored KV; None for `store.tenant_quota_bytes`.
        max_priority: a request that asks for more gets this; see the schedule's policy "fair".
        sees_all: may read the server's numbers and the traces of all tenants, as a dashboard does;
            others see their own traces.
    """

    key: str | None = None
    key_env: str | None = None
    key_sha256: str | None = None
    salt: str = ""
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    document_tokens: int | None = None
    store_bytes: int | None = None
    max_priority: int = 0
    sees_all: bool = False

    def __post_init__(self) -> None:
        given = [value for value in (self.key, self.key_env, self.key_sha256) if value is not None]
        if len(given) != 1 or not given[0]:
            raise ConfigError("serve.keys: each needs one of key, key_env and key_sha256")
        if self.key_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.key_sha256):
            raise ConfigError("serve.keys: key_sha256 is 64 hexadecimal digits")
        _positive(
            self,
            "max_concurrent",
            "requests_per_minute",
            "tokens_per_minute",
            "document_tokens",
            "store_bytes",
        )

    def digest(self, environment: Mapping[str, str] = os.environ) -> bytes:
        """SHA-256 of the key. ConfigError where the environment does not have it."""
        if self.key_sha256 is not None:
            return bytes.fromhex(self.key_sha256)
        key = self.key if self.key_env is None else environment.get(self.key_env, "")
        if not key:
            raise ConfigError(f"serve.keys: the environment variable {self.key_env} is not set")
        return sha256(key.encode(errors="surrogateescape")).digest()


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `headrace serve`.

    Args:
        host: address to listen at; without keys it must be the loopback's.
        port: 0 takes a free one.
        aliases: other names that the model answers to.
        keys: by the tenant's name. Without any, whoever reaches the server may use it.
        max_prompt_tokens: of one request; None is what the model can read.
        max_new_tokens: of one request; None is what the model has positions for.
        max_concurrent: requests at once, of all tenants.
        max_connections: open at once, idle ones included; fewer where the system allows the process
            fewer files, which the log says.
        body_bytes: of a request's body.
        header_bytes, header_timeout_s: of a request's line and headers.
        body_timeout_s: from the headers to the body's last byte.
        idle_timeout_s: of a connection between two requests.
        send_timeout_s: a client that reads nothing for so long is dropped.
        wait_s: a stream that has nothing to say says so this often, so that proxies keep it.
        drain_s: requests that run when the server is told to stop have so long to end.
        chat_template: a Jinja file; None is the model's own. A model without any gets lines of
            "role: content", the last one "assistant:".
        instructions: the system message behind which documents are read when they are added. A
            chat with another one computes their KV when it first needs them.
        chunk_tokens: of a document's chunks, at most.
        access_log: a file, or "-" for standard output: a line of JSON for every request, without
            prompts.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    aliases: tuple[str, ...] = ()
    keys: dict[str, KeyConfig] = {}
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_concurrent: int = 256
    max_connections: int = 1024
    body_bytes: int = 16 << 20
    header_bytes: int = 32 << 10
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    send_timeout_s: float = 30.0
    wait_s: float = 10.0
    drain_s: float = 30.0
    chat_template: str | None = None
    instructions: str = ""
    chunk_tokens: int = 512
    access_log: str | None = "-"

    def __post_init__(self) -> None:
        _positive(
            self, "max_prompt_tokens", "max_new_tokens", "max_concurrent", "max_connections",
            "body_bytes", "header_bytes", "header_timeout_s", "body_timeout_s", "idle_timeout_s",
            "send_timeout_s", "wait_s", "chunk_tokens",
        )  # fmt: skip
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"serve.port is a number from 0 to 65535, got {self.port}")
        for name in ("chat_template", "access_log"):
            if (path := getattr(self, name)) is not None and no_folder(path):
                raise ConfigError(f"serve.{name} must name a file, got {path!r}")
        if not self.drain_s >= 0:
            raise ConfigError(f"serve.drain_s must not be negative, got {self.drain_s}")
        for name in self.keys:
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"serve.keys: a name has up to 64 letters, digits and ._-, got {name!r}"
                )
        if not self.keys and not is_loopback(self.host):
            raise ConfigError(
                f"serve.host is {self.host!r} and there are no keys: everybody who reaches it "
                "could use the model and read its documents; add a table [serve.keys.NAME], or "
                "listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _positive(config: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"serve: {name} must be more than 0, got {value}")
