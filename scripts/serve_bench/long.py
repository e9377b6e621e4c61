"""Long prompts with a sparse method, whose keys and values do not fit in memory."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from serve_bench.leaks import compared, settled, warmed
from serve_bench.load import Job, load, summary
from serve_bench.process import Server
from serve_bench.settings import MIB, Bench, body

DOCUMENTS = 2  # prompts begin with one of them, so the store saves most of the reading
RSS_SHARE = 0.1  # spilling leaves the heap in pieces: it moves by so much, up and down
READING_S = 1800.0  # for both of them, before anything is measured


def jobs(bench: Bench, count: int, seed: int) -> Iterator[Job]:
    """Prompts of half the longest to the longest."""
    options, dice = bench.options, random.Random(seed)
    for number in range(count):
        tokens = dice.randint(_longest(bench) // 2, _longest(bench))
        start = 10**6 * (number % DOCUMENTS)
        leaves = dice.random() < options.leave
        yield Job(
            body(bench.texts.ids(start, tokens), options.new_tokens),
            leave_after=dice.randrange(options.new_tokens) if leaves else None,
        )


def measure(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """The record of the profile, and what is wrong."""
    options = bench.options
    engine = {
        "pinned_bytes": int(options.pinned_mib * MIB),
        "spill_path": str(bench.folder / "long-spill"),
    }
    store = {"host_bytes": 64 * MIB}
    with bench.serve(
        "long", engine=engine, method={"preset": "headrace"}, store=store,
        schedule={"max_running": options.clients},
    ) as server:  # fmt: skip
        return asyncio.run(_measured(bench, server))


async def _measured(bench: Bench, server: Server) -> tuple[dict[str, Any], list[str]]:
    options = bench.options
    bounds = {"clients": options.clients, "timeout_s": options.timeout}
    documents = [
        Job(body(bench.texts.ids(10**6 * n, _longest(bench)), options.new_tokens))
        for n in range(DOCUMENTS)
    ]
    await load(server.port, documents, clients=DOCUMENTS, timeout_s=READING_S)
    before = await warmed(
        server,
        lambda number: load(
            server.port, jobs(bench, 2 * options.clients, options.seed + number), **bounds
        ),
    )
    pool = server.get("/stats")["pool"]
    loaded = await load(
        server.port, jobs(bench, 10**6, options.seed), seconds=options.seconds, **bounds
    )
    record, wrong = compared(before, await settled(server), RSS_SHARE)
    record |= summary(*loaded)
    wrong += [f"error: {x}" for x in record["first_errors"]]
    after = server.get("/stats")["pool"]
    record["spill_read_bytes"] = after["spill_read_bytes"] - pool["spill_read_bytes"]
    record |= {"pinned_mib": options.pinned_mib, "longest": options.longest}
    if not record["spill_read_bytes"]:
        wrong.append("nothing was read from LMDB while decoding: lower --pinned-mib")
    return record, wrong


def _longest(bench: Bench) -> int:
    """Tokens of a prompt, without the answer's."""
    return min(bench.options.longest, bench.positions) - bench.options.new_tokens
