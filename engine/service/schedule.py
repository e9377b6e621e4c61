"""What a user may set about requests that run together over time."""

from typing import Literal

import msgspec

from engine.errors import ConfigError
from engine.service.order import FCFS, Fair, Policy
from kvstore.names import wrong_name


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a service.

    Args:
        step_tokens: of one step, prompts and answers together; None takes the prefill chunk.
            More of them read prompts faster, fewer keep the pauses between tokens short.
        slowdown: a step with prompts takes at most about so many times one without, while requests
            are answered; inf fills every step.
        max_running: requests that are read or answered at a time.
        max_waiting: requests that wait for a place; more are refused.
        max_tokens: of a request and its answer; None takes the model's positions. Where a GPU
            decodes sparsely, there is a place of this size for each of `max_running`, or of as
            many as the device has room for.
        policy: "fcfs" takes requests as they come; "fair" by priority, then by what each tenant
            had so far. See `engine.service.order`.
        aging_steps: under "fair", a request that waits rises by one priority in so many steps.
        swap_bytes: host memory that running requests' KV may be moved to, so that more requests are
            admitted than fit in `cache_bytes`; what does not fit there goes to `spill_path`, if
            that is set. Of no use with a sparse method, whose KV is in the pool already.
    """

    step_tokens: int | None = None
    slowdown: float = 1.75
    max_running: int = 64
    max_waiting: int = 256
    max_tokens: int | None = None
    policy: Literal["fcfs", "fair"] = "fcfs"
    aging_steps: int = 1000
    swap_bytes: int = 0

    def __post_init__(self) -> None:
        if (said := wrong_name(self)) is not None:
            raise ConfigError(f"schedule.{said}")
        for name in ("step_tokens", "max_running", "max_waiting", "max_tokens", "aging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"schedule.{name} must be at least 1, got {value}")
        if not self.slowdown > 1:
            raise ConfigError(f"schedule.slowdown must be more than 1, got {self.slowdown}")
        if self.swap_bytes < 0:
            raise ConfigError(f"schedule.swap_bytes must not be negative, got {self.swap_bytes}")
        if self.step_tokens is not None and self.step_tokens < self.max_running:
            raise ConfigError(
                f"schedule.step_tokens is {self.step_tokens}: it must be at least max_running "
                f"({self.max_running}), as every running request takes a token of every step"
            )

    def order(self) -> Policy:
        """Who comes first."""
        return FCFS() if self.policy == "fcfs" else Fair(self.aging_steps)
