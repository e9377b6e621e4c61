"""What a service is asked for, and how it says that it could not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from engine.blend.repair import BlendConfig
from engine.blend.segments import Segments
from engine.request import Event
from engine.sampling import Sampling
from engine.service.spans import Trace

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request.

    Args:
        prompt: token ids, or a prompt of parts.
        blend: how parts are reused; None takes the configuration's.
        engine: a tenant's view of the service's engine (`Engine.of_tenant`); None is the service's.
        tenant: a name, for fairness and for numbers.
        priority: higher ones first, under a policy that looks at it.
        deadline_s: seconds from submission; what is not complete then, ends.
        logprobs: how many of the most probable tokens to tell with each; None tells nothing.
        exact: no KV from the store that a lossy codec has changed, as in `Engine.generate`.
        trace: where the time goes is noted here.
    """

    prompt: Sequence[int] | Segments
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    blend: BlendConfig | None = None
    engine: "Engine | None" = None
    tenant: str = ""
    priority: int = 0
    deadline_s: float | None = None
    logprobs: int | None = None
    exact: bool = False
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The request is over without a completion."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request in a service."""

    id: int


Listener: TypeAlias = Callable[[Event | Failure], None]
