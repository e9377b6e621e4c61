"""What all routes work with."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request

from engine.engine import Engine
from engine.errors import ConfigError
from engine.serve.asks import Room
from engine.serve.call import CALL, Call
from engine.serve.config import ServeConfig
from engine.serve.limits import Slots
from engine.serve.observed import Observed
from engine.serve.parts import read_of
from engine.serve.refusals import no_model
from engine.serve.tenants import Tenant, Tenants
from engine.serve.token_text import TokenText
from engine.service import Service

T = TypeVar("T")

THREADS = 4
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

    def __init__(
        self,
        engine: Engine,
        service: Service,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.service, self.config = engine, service, engine.config.serve
        set_chat_template(engine, self.config)
        self.names = list(dict.fromkeys((name, *self.config.aliases)))
        self.created = time.time()
        self.fingerprint = fingerprint(engine)
        self.words = TokenText(engine.tokenizer)
        self.tenants = Tenants(engine, self.config, clock)
        self.slots = Slots("this server takes", self.config.max_concurrent)
        self.observed = Observed(name, read_of(engine, service))
        self.threads = ThreadPoolExecutor(THREADS, "headrace-http")
        self.draining = False

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

    def admit(self, request: Request, held: ExitStack) -> Tenant:
        """A tenant that may ask for work now; the places it takes are given back by `held`.

        Raises:
            Refusal: nobody's that we know.
            Exceeded: too many at once, or in a minute.
        """
        tenant = self.tenant(request)
        tenant.requests.take()
        held.enter_context(tenant.slots.hold())
        held.enter_context(self.slots.hold())
        return tenant

    def check_model(self, name: str) -> None:
        """Refusal where a request is for another model."""
        if name not in self.names:
            raise no_model(name)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What may take long, but not the engine."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    def drain(self) -> None:
        """Take no more requests; let those that run end, for as long as the configuration says."""
        self.draining = True
        self.service.drain(self.config.drain_s)
        self.service.close()

    def close(self) -> None:
        """Finish what waits in threads."""
        self.threads.shutdown()


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
    elif not engine.tokenizer.chat_template:
        engine.tokenizer.chat_template = PLAIN


def fingerprint(engine: Engine) -> str:
    """Changes when the same seed may give other tokens."""
    try:
        release = version("headrace")
    except PackageNotFoundError:  # run from a checkout
        release = ""
    parts = engine.identity.digest + release.encode() + repr(engine.config.method).encode()
    return f"fp_{sha256(parts).hexdigest()[:10]}"
