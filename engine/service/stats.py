"""Numbers that tell how a service is doing."""

from dataclasses import dataclass, field, replace

from engine.service.below import SwapStats
from engine.service.scheduler import Scheduler


@dataclass(slots=True)
class ServiceStats:
    """Of all requests: what is now, and what was since the service began."""

    waiting: int = 0
    running: int = 0  # read or answered
    swapped: int = 0  # moved to a lower tier, or on the way back
    chores: int = 0  # pieces of background work that are not done
    device_bytes: int = 0  # of KV on the device
    device_capacity_bytes: int = 0
    lower_bytes: int = 0  # reserved below, at worst
    lower_capacity_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed
    new_tokens: int = 0
    preemptions: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    swap: SwapStats = field(default_factory=SwapStats)

    def now(self, scheduler: Scheduler, chores: int) -> "ServiceStats":
        """A copy, with what a scheduler says of this moment."""
        limits = scheduler.limits
        return replace(
            self,
            waiting=len(scheduler.waiting),
            running=scheduler.running,
            swapped=scheduler.out,
            chores=chores,
            device_bytes=scheduler.device_used,
            device_capacity_bytes=limits.device_bytes,
            lower_bytes=scheduler.lower_used,
            lower_capacity_bytes=limits.lower_bytes,
            preemptions=scheduler.preemptions,
        )
