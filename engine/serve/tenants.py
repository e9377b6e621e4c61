"""Who asks: a key's owner, with KV, documents and limits that nobody else shares."""

import asyncio
import hmac
import logging
from dataclasses import dataclass, field
from hashlib import sha256

from starlette.requests import Request

from engine.engine import Engine
from engine.errors import ConfigError, ModelError, PromptError
from engine.rag.question import around_chat
from engine.rag.shelf import Shelf
from engine.serve.config import KeyConfig, ServeConfig, is_loopback
from engine.serve.limits import Bucket, Slots
from engine.serve.refusals import forbidden, unauthorized
from kvstore.block import tenant_tag

log = logging.getLogger(__name__)

BEARER = "bearer "
HIGHEST = 100  # priority


@dataclass(slots=True, eq=False)
class Tenant:
    """One of those whom the server knows.

    Args:
        name: for logs and numbers; "" where there are no keys.
        engine: the server's, as this tenant sees it.
        shelf: the tenant's documents; None where the model's KV cannot be moved.
        max_priority: a request that asks for more gets this.
        document_tokens: of all documents; None for no limit.
        sees_all: may read everybody's numbers.
    """

    name: str
    engine: Engine
    shelf: Shelf | None
    slots: Slots
    requests: Bucket
    tokens: Bucket
    max_priority: int
    document_tokens: int | None
    sees_all: bool
    adding: asyncio.Lock = field(default_factory=asyncio.Lock)  # counts documents, then adds some


class Tenants:
    """All of them, by their keys.

    Raises:
        ConfigError: a key is not to be had, or two tenants have the same.
        CatalogueError: the documents of one cannot be read.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self._engine, self._config = engine, config
        self._by_key: list[tuple[bytes, Tenant]] = []
        self._anybody: Tenant | None = None
        if not config.keys:
            self._anybody = self._tenant(
                "", engine, KeyConfig(key="none", max_priority=HIGHEST, sees_all=True)
            )
        for name, key in config.keys.items():
            self._add(name, key)

    def all(self) -> list[Tenant]:
        """In the order of the configuration."""
        known = [tenant for _, tenant in self._by_key]
        return known if self._anybody is None else [self._anybody]

    def names(self) -> dict[bytes, str]:
        """By the tags of their blocks."""
        return {tag_of(tenant.engine): tenant.name for tenant in self.all()}

    def of(self, request: Request) -> Tenant:
        """Whose request it is.

        Raises:
            Refusal: 401 for no key or an unknown one; 403 for a web page of elsewhere that uses a
                server without keys through its reader's browser.
        """
        if self._anybody is not None:
            _refuse_foreign(request)
            return self._anybody
        given = request.headers.get("authorization", "")
        if given[: len(BEARER)].lower() != BEARER:
            raise unauthorized(
                "You didn't provide an API key. Send it in an Authorization header, as in "
                "Authorization: Bearer YOUR_KEY."
            )
        # headers are bytes, which starlette reads as latin-1
        digest = sha256(given[len(BEARER) :].strip().encode("latin-1")).digest()
        found = None
        for known, tenant in self._by_key:  # all of them, in the same time
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise unauthorized("Incorrect API key provided.")
        return found

    def _add(self, name: str, key: KeyConfig) -> None:
        digest = key.digest()
        if any(known == digest for known, _ in self._by_key):
            raise ConfigError(f"serve.keys.{name}: another name has the same key")
        own = key.salt.encode() or digest
        secret = hmac.digest(own, b"headrace tenant " + name.encode(), "sha256")
        view = self._engine.of_tenant(secret.hex())
        self._by_key.append((digest, self._tenant(name, view, key)))
        if key.store_bytes is not None:
            view.store.limit(tag_of(view), key.store_bytes)

    def _tenant(self, name: str, view: Engine, key: KeyConfig) -> Tenant:
        return Tenant(
            name,
            view,
            _shelf(view, self._config),
            Slots("this key has", key.max_concurrent),
            Bucket("requests", key.requests_per_minute),
            Bucket("tokens", key.tokens_per_minute),
            key.max_priority,
            key.document_tokens,
            key.sees_all,
        )


def tag_of(engine: Engine) -> bytes:
    """What the blocks of an engine's tenant carry."""
    return tenant_tag(engine.config.tenant.encode())


def _shelf(engine: Engine, config: ServeConfig) -> Shelf | None:
    """A tenant's documents; None where this model cannot reuse them."""
    messages = [{"role": "user", "content": "?"}]
    if config.instructions:
        messages.insert(0, {"role": "system", "content": config.instructions})
    try:
        return Shelf(engine, around_chat(engine, messages).before, config.chunk_tokens)
    except (ModelError, PromptError) as error:  # frequencies that depend on the length, e.g.
        log.warning("no documents are served: %s", error)
        return None


def _refuse_foreign(request: Request) -> None:
    """A browser sends a page's requests to this machine's own address, and names of others that
    were made to mean it, too: where no key is needed, both are told by their headers.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    ours = (None, f"http://{host}", f"https://{host}")
    if not is_loopback(_without_port(host)) or origin not in ours:
        raise forbidden("Without keys this server answers programs on its own machine only.")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
