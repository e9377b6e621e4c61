"""What all routes work with."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from jinja2 import TemplateSyntaxError
from starlette.requests import Request

from engine.engine import Engine
from engine.errors import ConfigError, PromptError
from engine.serve.asks import Room
from engine.serve.call import CALL, Call
from engine.serve.config import ServeConfig
from engine.serve.limits import Exceeded, Place, Slots
from engine.serve.observed import Observed
from engine.serve.parts import read_of
from engine.serve.reading import SMALL
from engine.serve.refusals import no_model, overloaded
from engine.serve.tenants import Tenant, Tenants
from engine.serve.token_text import TokenText, longest
from engine.service.service import Service

T = TypeVar("T")

THREADS = 4  # for texts, which take as long as they are
READERS = 2  # for documents, which may be longer than any prompt
RECORDERS = 2  # for what others wait for: to be cancelled, noted
KEEPERS = 2  # for what waits for the store, which waits for its disk
# of a model that has no chat template
PLAIN = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- message['role'] + ': ' + message['content'] + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
)


class Desk:
    """One server's engine, tenants and limits. Close it when no request runs any more.

    Args:
        name: what clients call the model.
        service: of the engine.
    Raises:
        ConfigError: the model has no tokenizer, or a setting cannot be.
    """

    def __init__(self, engine: Engine, service: Service, name: str) -> None:
        self.engine, self.service, self.config = engine, service, engine.config.serve
        set_chat_template(engine, self.config)
        self.names = list(dict.fromkeys((name, *self.config.aliases)))
        self.created = time.time()
        self.fingerprint = fingerprint(engine)
        self.words = TokenText(engine.tokenizer)
        self.token_bytes = longest(engine.tokenizer)
        self.tenants = Tenants(engine, self.config)
        self.slots = Slots("this server takes", self.config.max_concurrent)
        self.observed = Observed(name, read_of(engine, service, self.tenants.names()))
        self.threads = ThreadPoolExecutor(THREADS, "headrace-http")
        self.readers = ThreadPoolExecutor(READERS, "headrace-readers")
        self.recorders = ThreadPoolExecutor(RECORDERS, "headrace-records")
        self.keepers = ThreadPoolExecutor(KEEPERS, "headrace-keeper")

    @property
    def room(self) -> Room:
        """How many tokens a request may have."""
        positions, most = (
            self.engine.model.shape.max_positions,
            self.engine.config.schedule.max_tokens,
        )
        return Room(
            positions=positions if most is None else min(positions, most - 1),
            prompt_tokens=self.config.max_prompt_tokens,
            new_tokens=self.config.max_new_tokens,
            longest=self.service.longest,
            token_bytes=self.token_bytes,
        )

    def tenant(self, request: Request) -> Tenant:
        """Whose request it is. Refusal: nobody's that we know."""
        tenant = self.tenants.of(request)
        call: Call = request.scope[CALL]
        call.tenant = tenant.name
        return tenant

    def viewer(self, request: Request) -> str | None:
        """The tenant whose numbers may be seen; None for all of them."""
        tenant = self.tenant(request)
        return None if tenant.sees_all else tenant.name

    def admit(self, request: Request, held: ExitStack) -> tuple[Tenant, Place]:
        """A tenant that may ask for work now, and the place it takes, which `held` leaves.

        Raises:
            Refusal: nobody's that we know; the server has no place.
            Exceeded: too many at once, or in a minute.
        """
        tenant, place = self.tenant(request), Place()
        held.callback(place.leave)
        tenant.requests.take()
        place.take(tenant.slots)
        try:
            place.take(self.slots)
        except Exceeded as full:  # of others' requests
            raise overloaded("The server is overloaded: too many requests at once.") from full
        return tenant, place

    def check_model(self, name: str) -> None:
        """Refusal where a request is for another model."""
        if name not in self.names:
            raise no_model(name)

    async def in_thread(self, work: Callable[[], T], place: Place | None = None) -> T:
        """What may take long, but not the engine; the place is kept meanwhile."""
        return await _done(self.threads, work, place)

    async def read(self, work: Callable[[], T], place: Place) -> T:
        """What reads documents, and holds up nobody's prompt."""
        return await _done(self.readers, work, place)

    async def recorded(self, work: Callable[[], T], place: Place | None = None) -> T:
        """What changes or asks records, which does not wait for anybody's long text."""
        return await _done(self.recorders, work, place)

    async def kept(self, work: Callable[[], T], place: Place) -> T:
        """What waits until the store has written, or deleted."""
        return await _done(self.keepers, work, place)

    async def parsed(self, parse: Callable[[bytes], T], body: bytes, place: Place) -> T:
        """The request that a body holds. A large one does not hold up the others."""
        if len(body) <= SMALL:
            return parse(body)
        return await self.in_thread(lambda: parse(body), place)

    def drain(self) -> None:
        """Take no more requests; let those that run end, for as long as the configuration says."""
        self.service.drain(self.config.drain_s)
        self.service.close()

    def close(self) -> None:
        """Finish what waits in threads."""
        for threads in (self.threads, self.readers, self.keepers, self.recorders):
            threads.shutdown()


async def _done(threads: Executor, work: Callable[[], T], place: Place | None) -> T:
    future = threads.submit(work)
    if place is not None:
        place.until(future)
    try:
        return await asyncio.wrap_future(future)
    finally:
        del future  # whose error knows this frame: a ring, which would keep all of the request


def set_chat_template(engine: Engine, config: ServeConfig) -> None:
    """The tokenizer gets the configured template, or a plain one where it has none."""
    if engine.tokenizer is None:
        raise ConfigError("the model has no tokenizer: a server needs one")
    if config.chat_template is not None:
        try:
            engine.tokenizer.chat_template = Path(config.chat_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read serve.chat_template {config.chat_template}: {error}"
            ) from error
        _refuse_wrong_template(engine, config.chat_template)
    elif not engine.tokenizer.chat_template:
        engine.tokenizer.chat_template = PLAIN


def _refuse_wrong_template(engine: Engine, file: str) -> None:
    """ConfigError where it is none: all that is asked would be refused, whatever it is."""
    try:
        engine.render([{"role": "user", "content": "?"}])
    except PromptError as error:  # any other may be of this conversation alone
        if isinstance(wrong := error.__cause__, TemplateSyntaxError):
            raise ConfigError(
                f"serve.chat_template {file} is no template: {wrong} (line {wrong.lineno})"
            ) from error


def fingerprint(engine: Engine) -> str:
    """Changes when the same seed may give other tokens."""
    try:
        release = version("headrace")
    except PackageNotFoundError:  # run from a checkout
        release = ""
    parts = engine.identity.digest + release.encode() + repr(engine.config.method).encode()
    return f"fp_{sha256(parts).hexdigest()[:10]}"
