"""Many clients, lengths and arrivals as recorded, some of which go away."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from evals.traffic.arrival import Arrival, cut, rescaled
from evals.traffic.generate import Traffic, generate
from evals.traffic.read import read_arrivals
from evals.traffic.spread import Spread
from serve_bench.leaks import compared, settled, warmed
from serve_bench.load import Job, Loaded, load, summary
from serve_bench.process import Server
from serve_bench.settings import MIB, Bench, body, real_trace

RSS_SHARE = 0.02
LATE = 16  # the longest prompt is so many tokens shorter, as text read again may be longer
TRAFFIC = Traffic(  # as Azure's conversations (Patel et al. 2024), in turns
    gap_s=Spread(0.18, 1.5, "gamma"),
    message=Spread(700.0, 1.0),
    answer=Spread(210.0, 0.8),
    turns=2.5,
    think_s=Spread(10.0, 1.0, "gamma"),
    failures=0.02,
)
HOST_BYTES, DISK_BYTES = 32 * MIB, 64 * MIB  # small, so both are full before anything is measured


def arrivals(bench: Bench, count: int, seed: int) -> tuple[str, list[Arrival]]:
    """Where they come from, and requests at the rate and of the lengths of the options."""
    options = bench.options
    trace = options.trace or real_trace()
    if trace is None or options.generate:
        source, found = "generator", generate(TRAFFIC, count, seed)
    else:
        source, found = trace.name, read_arrivals(trace)
        first = random.Random(seed).randrange(max(1, len(found) - count))
        found = found[first : first + count]
    fitting = cut(found, min(bench.positions, options.max_tokens), new_tokens=options.new_tokens)
    return source, rescaled(fitting, options.rate)


def jobs(bench: Bench, found: list[Arrival], seed: int) -> Iterator[Job]:
    """The requests; a share of the clients goes away somewhere, and so do those of failures."""
    dice = random.Random(seed)
    starts: dict[str, int] = {}
    for x in found:
        start = dice.randrange(1 << 40)
        if x.session is not None:  # a conversation's prompts begin alike
            start = starts.setdefault(x.session, start)
        text = bench.texts.text(start, max(1, x.prompt_tokens - LATE))
        new = x.new_tokens or bench.options.new_tokens
        leaves = x.failed or dice.random() < bench.options.leave
        yield Job(
            body(text, new),
            at_s=x.at_s,
            leave_after=dice.randrange(new) if leaves else None,
            leave=dice.choice(("close", "reset")),
        )


def measure(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """The record of the profile, and what is wrong."""
    options = bench.options
    store = {"host_bytes": HOST_BYTES, "disk_bytes": DISK_BYTES}
    schedule = {"max_running": options.clients, "step_tokens": max(512, options.clients)}
    with bench.serve("mixed", store=store, schedule=schedule) as server:
        return asyncio.run(_measured(bench, server))


async def _loaded(bench: Bench, server: Server, seconds: float, seed: int) -> tuple[str, Loaded]:
    """Where the requests come from, and what came of them."""
    options = bench.options
    count = int(options.rate * seconds * 2) + options.clients
    source, found = arrivals(bench, count, seed)
    return source, await load(
        server.port, jobs(bench, found, seed), clients=options.clients, seconds=seconds,
        timeout_s=options.timeout,
    )  # fmt: skip


async def _measured(bench: Bench, server: Server) -> tuple[dict[str, Any], list[str]]:
    options = bench.options
    before = await warmed(
        server, lambda number: _loaded(bench, server, options.warm, options.seed + number)
    )
    source, loaded = await _loaded(bench, server, options.seconds, options.seed)
    record, wrong = compared(before, await settled(server), RSS_SHARE)
    record |= {"arrivals": source} | summary(*loaded)
    wrong += [f"error: {x}" for x in record["first_errors"]]
    stats = server.get("/stats")
    spans = {name: stats[name] for name in ("coverage", "shares")}
    return record | {"stats": stats["requests"], "spans": spans}, wrong
