"""Tokens per second beside `transformers serve`, with the same model, prompts and clients."""

import asyncio
import random
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from native.folders import cache_folder
from serve_bench.leaks import compared, settled
from serve_bench.load import Job, Loaded, load, summary
from serve_bench.process import Server, ServerFailed, transformers
from serve_bench.settings import MIB, Bench, body

NEEDED = ("fastapi", "accelerate", "opentelemetry-api", "psutil")  # theirs, and not ours
QUESTION = 64  # tokens behind the shared ones
PREFIXES = 4  # in each round, new ones
WANTED = 2.0
KEPT = ("requests", "errors", "prompt_tokens", "cached_tokens", "new_tokens", "p50_ttft_s")
KEPT += ("p99_ttft_s", "p50_tpot_s", "p99_tpot_s")
OURS, THEIRS = "headrace", "transformers"


def measure(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """The record of the profile, and what is wrong. Both servers are up; rounds alternate."""
    options = bench.options
    schedule = {"max_running": options.clients, "step_tokens": 1024}
    with (
        bench.serve("shared", schedule=schedule, store={"host_bytes": 1024 * MIB}) as ours,
        transformers(
            str(bench.model), site(), bench.folder / "theirs.log", options.theirs.split(),
            options.threads,
        ) as theirs,
    ):  # fmt: skip
        rounds, leaks = asyncio.run(_measured(bench, {OURS: ours, THEIRS: theirs}))
    record, wrong = _record(bench, rounds)
    return record | leaks[0], wrong + leaks[1]


def site() -> Path:
    """A folder with what `transformers serve` needs beside our own packages; made where missing."""
    folder = cache_folder() / f"transformers-serve-{version('transformers')}"
    done = folder / "complete"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run(
            [*command, "--target", str(folder), *NEEDED], check=True, stdout=sys.stderr, timeout=600
        )
        done.touch()
    return folder


async def _measured(
    bench: Bench, servers: dict[str, Server]
) -> tuple[dict[str, list[dict[str, Any]]], tuple[dict[str, Any], list[str]]]:
    """The rounds, and what ours holds behind them."""
    await _first(bench, servers)
    before = await settled(servers[OURS])
    rounds = await _rounds(bench, servers)
    return rounds, compared(before, await settled(servers[OURS]), None)


async def _first(bench: Bench, servers: dict[str, Server]) -> None:
    """A request to each: the first one of theirs makes its cache."""
    for name, server in servers.items():
        [reply] = (await load(server.port, _jobs(bench, 10**6, name)[:1], clients=1)).replies
        if reply.error is not None:
            raise ServerFailed(f"{name} does not serve: {reply.error}")


async def _rounds(bench: Bench, servers: dict[str, Server]) -> dict[str, list[dict[str, Any]]]:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for number in range(bench.options.rounds):
        for name, server in servers.items():
            loaded = await load(
                server.port, _jobs(bench, number, name), clients=bench.options.clients,
                timeout_s=bench.options.timeout,
            )  # fmt: skip
            rounds[name].append(_round(loaded))
    return rounds


def _jobs(bench: Bench, number: int, server: str) -> list[Job]:
    """The requests of a round, one of each client: a shared prefix, and a question of its own."""
    options, dice = bench.options, random.Random(number)
    prefixes = [
        bench.texts.text(dice.randrange(1 << 40), options.prefix_tokens) for _ in range(PREFIXES)
    ]
    found = []
    for client in range(options.clients):
        prompt = (
            f"{prefixes[client % PREFIXES]}\n{bench.texts.text(dice.randrange(1 << 40), QUESTION)}"
        )
        found.append(Job(body(prompt, options.new_tokens)))
    if server == THEIRS:  # which knows its model by the path, and says its usage unasked
        return [replace(x, body=_theirs(x.body) | {"model": str(bench.model)}) for x in found]
    return found


def _theirs(ours: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in ours.items() if name != "stream_options"}


def _round(loaded: Loaded) -> dict[str, Any]:
    numbers = summary(*loaded)
    found = {name: numbers[name] for name in (*KEPT, "tokens_per_s", "first_errors")}
    return found | {"seconds": round(loaded.seconds, 3)}


def _record(
    bench: Bench, rounds: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], list[str]]:
    ours, theirs = rounds[OURS], rounds[THEIRS]
    ratios = sorted(
        a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, theirs, strict=True)
    )
    record = {
        "requests": sum(x["requests"] for x in ours),
        "errors": sum(x["errors"] for x in ours),
        "p99_ttft_s": max(x["p99_ttft_s"] for x in ours),
        "p99_tpot_s": max(x["p99_tpot_s"] for x in ours),
        "prefix_tokens": bench.options.prefix_tokens,
        "prefixes": PREFIXES,
        "theirs": bench.options.theirs,
        "rounds": rounds,
        "ratio": ratios[len(ratios) // 2],
    }
    wrong = [f"{name}: {x}" for name, at in rounds.items() for y in at for x in y["first_errors"]]
    if record["ratio"] < WANTED:
        wrong.append(f"{record['ratio']:.2f} times their tokens/s: {WANTED:g} is wanted")
    return record, wrong
