"""How much running streams slow down when long prompts arrive: read in chunks, and at once."""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

from serve_bench.client import Reply
from serve_bench.leaks import compared, settled
from serve_bench.load import Job, Loaded, load, summary
from serve_bench.process import Server, ServerFailed
from serve_bench.settings import MIB, Bench, body

WHOLE = 1 << 20  # tokens of a step: any prompt in one
SHORT = 128  # tokens of a stream's prompt
ALLOWED = 2.0
KEPT = ("requests", "errors", "new_tokens", "p50_tpot_s", "p99_tpot_s", "p50_gap_s", "p99_gap_s")


def measure(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """The record of the profile, and what is wrong."""
    found: dict[str, Any] = {}
    replies: list[Reply] = []
    begun = time.perf_counter()
    chunked, whole = (
        {"step_tokens": bench.options.step_tokens},
        {"step_tokens": WHOLE, "slowdown": 1e9},
    )
    for name, settings in (("chunked", chunked), ("whole", whole)):
        schedule = {"max_running": bench.options.clients + 4, **settings}
        with bench.serve(name, schedule=schedule, store={"host_bytes": 256 * MIB}) as server:
            found[name] = asyncio.run(_phases(bench, server, replies))
    record = summary(replies, time.perf_counter() - begun)
    record |= {"phases": found, "long_tokens": long_tokens(bench)}
    record["step_tokens"] = bench.options.step_tokens
    wrong = [f"error: {x}" for x in record["first_errors"]]
    record["p99_tpot_s"] = found["chunked"]["with"]["p99_tpot_s"]
    record["tpot_ratio"] = {name: at["ratio"] for name, at in found.items()}
    leaks = [at.pop("leaks") for at in found.values()]
    record |= leaks[0][0]
    wrong += [x for _, wrongs in leaks for x in wrongs]
    if record["tpot_ratio"]["chunked"] > ALLOWED:
        wrong.append(f"p99 TPOT is {record['tpot_ratio']['chunked']:.2f} times that without")
    return record, wrong


def long_tokens(bench: Bench) -> int:
    """Of a prompt that disturbs."""
    return min(bench.options.long_tokens, bench.positions - 1)


async def _phases(bench: Bench, server: Server, replies: list[Reply]) -> dict[str, Any]:
    seconds = bench.options.seconds / 4  # two servers, without and with
    await _streams(bench, server, min(5.0, seconds), 0)
    before, found = await settled(server), dict[str, Any]()
    for number, phase in enumerate(("without", "with"), 1):
        streams = asyncio.create_task(_streams(bench, server, seconds, number))
        long = (await _longs(bench, server, seconds)).replies if phase == "with" else []
        got = await streams
        replies += [*got.replies, *long]
        numbers = summary(*got)
        found[phase] = {key: numbers[key] for key in KEPT} | {"long_prompts": len(long)}
    without, beside = found["without"]["p99_tpot_s"], found["with"]["p99_tpot_s"]
    if without is None or beside is None:
        raise ServerFailed("no stream came to its end: give it more --seconds")
    gaps = found["with"]["p99_gap_s"] / found["without"]["p99_gap_s"]
    leaks = compared(before, await settled(server), None)
    return found | {"ratio": beside / without, "gap_ratio": gaps, "leaks": leaks}


async def _streams(bench: Bench, server: Server, seconds: float, seed: int) -> Loaded:
    """Every client asks again when it has its answer."""
    options = bench.options

    def jobs() -> Iterator[Job]:
        dice = random.Random(seed)
        while True:
            ids = bench.texts.ids(dice.randrange(1 << 40), SHORT)
            yield Job(body(ids, options.new_tokens))

    return await load(
        server.port, jobs(), clients=options.clients, seconds=seconds, timeout_s=options.timeout
    )


async def _longs(bench: Bench, server: Server, seconds: float) -> Loaded:
    """A long prompt every few seconds, each another one, that asks for one token."""
    options = bench.options
    jobs = (
        Job(body(bench.texts.ids(31337 * n + 7, long_tokens(bench)), 1), at_s=options.every * n)
        for n in itertools.count()
    )
    return await load(server.port, jobs, clients=4, seconds=seconds, timeout_s=options.timeout)
