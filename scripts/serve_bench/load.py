"""Many clients at once: each takes the next request when its time has come."""

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve_bench.client import Leave, Reply, complete


@dataclass(frozen=True, slots=True)
class Job:
    """A request to send.

    Args:
        at_s: not before, from the start of the load.
        leave_after: the client goes away behind so many events with text; None: it stays.
    """

    body: dict[str, Any]
    at_s: float = 0.0
    leave_after: int | None = None
    leave: Leave = "close"


class Loaded(NamedTuple):
    """All replies, and how long it took to have them."""

    replies: list[Reply]
    seconds: float


async def load(
    port: int,
    jobs: Iterable[Job],
    *,
    clients: int,
    seconds: float = float("inf"),
    timeout_s: float = 600.0,
) -> Loaded:
    """Replies to all jobs that began in time, once all are over.

    Args:
        seconds: no request begins later than this.
        timeout_s: of one request.
    """
    left, begun = iter(jobs), time.perf_counter()
    lists = await asyncio.gather(
        *(_client(port, left, begun, seconds, timeout_s) for _ in range(clients))
    )
    return Loaded([x for replies in lists for x in replies], time.perf_counter() - begun)


async def _client(
    port: int, jobs: Iterator[Job], begun: float, seconds: float, timeout_s: float
) -> list[Reply]:
    replies: list[Reply] = []
    for job in jobs:  # all clients take from one iterator
        now = time.perf_counter() - begun
        if max(now, job.at_s) > seconds:
            break
        await asyncio.sleep(max(0.0, job.at_s - now))
        replies.append(
            await complete(
                port,
                job.body,
                timeout_s=timeout_s,
                leave_after=job.leave_after,
                leave=job.leave,
            )
        )
    return replies


def quantile(values: Iterable[float | None], share: float) -> float | None:
    """Of those that are numbers; None where none is."""
    ordered = sorted(x for x in values if x is not None)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Counts and times; times and tokens are of requests whose client stayed.

    Args:
        seconds: that all of them took together.
    """
    good = [x for x in replies if not x.left and x.error is None]
    wrong = [x.error for x in replies if x.error is not None]
    found: dict[str, Any] = {
        "requests": len(replies),
        "errors": len(wrong),
        "left": sum(x.left for x in replies),
        "prompt_tokens": sum(x.prompt_tokens for x in good),
        "cached_tokens": sum(x.cached_tokens for x in good),
        "new_tokens": sum(x.new_tokens for x in good),
        "first_errors": wrong[:5],
    }
    found["tokens_per_s"] = found["new_tokens"] / seconds
    gaps = [gap for x in good for gap in x.gaps_s]
    values = {"ttft": [x.ttft_s for x in good], "tpot": [x.tpot_s for x in good], "gap": gaps}
    for name, measured in values.items():
        found |= {f"p{p}_{name}_s": quantile(measured, p / 100) for p in (50, 99)}
    return found
