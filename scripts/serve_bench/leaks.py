"""What a server holds when it has nothing to do; compared before and after a load."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from serve_bench.process import Server

IDLE_S = 120.0
STEADY_S = 2.0
ROUNDS, STEADY = 6, 1.005  # of warming up, which is over when memory grows by less
BUSY = ("waiting", "running", "swapped", "background")


@dataclass(frozen=True, slots=True)
class Held:
    """Of an idle server, in bytes unless a name says otherwise.

    Args:
        anonymous: resident memory that no file backs; the rest of `rss` is mapped files.
        requests: keys and values of requests, wherever they are; 0 when there is none.
        pinned_blocks, open_leases, open_files, requests_left: counts.
    """

    rss: int
    anonymous: int
    requests: int
    pinned_blocks: int
    open_leases: int
    open_files: int
    requests_left: int

    @property
    def leaked_bytes(self) -> int:
        """Memory of requests that are over."""
        return self.requests


async def settled(server: Server) -> Held:
    """What is held once nothing runs, nothing waits to be written, and no file is closed."""
    until, steady_since, last = time.monotonic() + IDLE_S, time.monotonic(), None
    while True:
        stats = await asyncio.to_thread(server.get, "/stats")
        now = (_busy(stats), server.open_files())
        if now != last or now[0]:
            steady_since, last = time.monotonic(), now
        if time.monotonic() - steady_since > STEADY_S or time.monotonic() > until:
            return _held(server, stats)
        await asyncio.sleep(0.1)


async def warmed(server: Server, load: Callable[[int], Awaitable[object]]) -> Held:
    """What is held once caches are full, and the heap has its size: when memory grows no more.

    Args:
        load: one of up to `ROUNDS` loads, which are numbered from 1.
    """
    before = held = await settled(server)
    for number in range(1, ROUNDS + 1):
        await load(number)
        held = await settled(server)
        if held.rss <= before.rss * STEADY:
            break
        before = held
    return held


def _busy(stats: dict[str, Any]) -> int:
    counts = stats["requests"]
    return sum(counts[x] for x in BUSY) + stats["queued_bytes"]


def _held(server: Server, stats: dict[str, Any]) -> Held:
    pool = stats["pool"] or {"used_bytes": 0, "open_leases": 0}
    counts, kv = stats["requests"], stats["running"]
    return Held(
        rss=server.rss_bytes(),
        anonymous=server.anonymous_bytes(),
        requests=pool["used_bytes"] + kv["device_bytes"] + kv["lower_bytes"],
        pinned_blocks=stats["pinned_blocks"],
        open_leases=pool["open_leases"],
        open_files=server.open_files(),
        requests_left=sum(counts[x] for x in BUSY),
    )


def compared(
    before: Held, after: Held, rss_share: float | None
) -> tuple[dict[str, Any], list[str]]:
    """Numbers for the record, and what is wrong with them.

    Args:
        rss_share: how much more of the resident memory may be held than before; None where the
            store still fills, which is not judged.
    """
    growth = after.rss / before.rss - 1
    found = {
        "rss_growth": round(growth, 5),
        "anonymous_growth": round(after.anonymous / before.anonymous - 1, 5),
        "leaked_bytes": after.leaked_bytes,
        "held_before": asdict(before),
        "held_after": asdict(after),
    }
    wrong = [
        f"{getattr(after, name)} {words}"
        for name, words in (
            ("leaked_bytes", "bytes of requests that are over"),
            ("pinned_blocks", "blocks still pinned"),
            ("open_leases", "leases still open"),
            ("requests_left", "requests still there"),
        )
        if getattr(after, name)
    ]
    if after.open_files > before.open_files:
        wrong.append(f"{after.open_files} open files, {before.open_files} before")
    if rss_share is not None and growth > rss_share:
        wrong.append(f"resident memory grew by {growth:.1%}: {rss_share:.0%} is allowed")
    return found, wrong
