#!/usr/bin/env python3
"""Needles answered right by every way to choose tokens, at the same number of tokens.

A text of 4,096 tokens (reference pages of the Python language) holds 32 needles. It is read
densely, once; each question then starts from that context and goes token by token through the
decode path, as does its answer. Right means all six digits. Sinks (4) and window (16) are inside
the budget, and every method attends to exactly the budget. With --long, texts of 16,384 tokens
hold 8 needles each.

oracle        exact scores, the best that a choice of tokens could do
window        the sinks, and the last tokens: what a method gets for nothing
rank N        low-rank keys under the default's index: what the rank alone costs
a2ats@N       with all keys at a distance of N tokens instead of 2,048
landmarks     ShadowKV's index alone: exact keys, no outliers

The rank of `shadowkv` and of `lowrank+scalar+int4` is the least whose output error is tolerated
in every layer, by `retrieval.lowrank.choose_rank` on a text that is not asked about.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import add_outputs, facts, finish
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.commands.session import quiet
from engine.engine import Engine
from engine.method import Method, preset
from evals.needles import Context, Needles, ask, low_rank
from retrieval.select import Policy

MODELS = ("needle-tiny", "needle-smear")
BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
CALIBRATION_SEED = 1000  # of the text that ranks are chosen on
RANKS = (16, 32, 48, 64, 80, 96, 112, 128)  # 128: all joint dimensions of these models' keys
TOLERANCE = 0.1  # of the output error, see `choose_rank`
CHOSEN = 0  # stands for the rank that was chosen
INDEX: dict[str, Any] = {"tail": False}  # the index alone: what it does not select is not estimated
LOWRANK = INDEX | {"keys": "lowrank"}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "oracle": ("oracle", {}),
    "window": ("oracle", {}),
    "headrace": ("headrace", {}),
    "headrace, no tail": ("headrace", INDEX),
    "headrace 1 bit": ("headrace", INDEX | {"options": {"bits": 1}}),
    "headrace 4 bits": ("headrace", INDEX | {"options": {"bits": 4}}),
    "shadowkv": ("shadowkv", {"rank": CHOSEN}),
    "a2ats": ("a2ats", {}),
    "quest": ("quest", {}),
    "pqcache": ("pqcache", {}),
    "lowrank+scalar+int4": ("headrace", LOWRANK | {"rank": CHOSEN, "values": "int4"}),
    **{f"rank {n}": ("headrace", LOWRANK | {"rank": n}) for n in (16, 20, 32, 48)},
    "a2ats@64": ("a2ats", {"distance": 64}),
    "a2ats@512": ("a2ats", {"distance": 512}),
    "landmarks": ("shadowkv", {"keys": "exact", "options": {"chunk": 8, "outlier_chunks": 0}}),
}
ON_REQUEST = ("a2ats@64", "a2ats@512", "landmarks")
CONSOLE = Console(stderr=True, soft_wrap=True)


class Setup(NamedTuple):
    """How long the texts are, and how much is hidden and asked in them."""

    tokens: int
    needles: int
    documents: int
    questions: int  # of each document


class Job(NamedTuple):
    """One model and one document; done by a process of its own, on one thread."""

    model: str
    seed: int
    setup: Setup
    methods: Sequence[str]
    budgets: Sequence[float]


class Cell(NamedTuple):
    """Questions answered right, and tokens attended to of each KV head."""

    right: tuple[bool, ...]
    attended: float


class Result(NamedTuple):
    """What came of a job."""

    job: Job
    context_tokens: int
    rank: int | None
    error: float | None  # of the rank that was chosen
    cells: dict[tuple[str, float], Cell]


def run(job: Job) -> Result:
    """All methods and budgets on one document."""
    torch.set_num_threads(1)  # two are no faster with models this small
    quiet()
    with Engine.from_pretrained(job.model, device="cpu") as engine:
        document = _document(engine, job.setup, job.seed)
        questions = spread(document.questions, job.setup.questions)
        context = Context(engine.model, document.context)
        rank, error = _rank(engine, job)
        dense = ask(engine, context, questions, Method())
        cells = {("dense", 1.0): Cell(dense.right, context.length)}
        for name, budget in ((n, b) for n in job.methods for b in job.budgets):
            method = settings(name, budget, rank)
            policy = window_only(method, context.length) if name == "window" else None
            score = ask(engine, context, questions, method, policy)
            assert score.attended is not None, "every method here is sparse"
            cells[name, budget] = Cell(score.right, score.attended)
        return Result(job, context.length, rank, error, cells)


def settings(name: str, budget: float, rank: int | None) -> Method:
    base, changes = SETTINGS[name]
    if changes.get("rank") == CHOSEN:
        changes = changes | {"rank": rank}
    return preset(base, budget=budget, **changes)


def window_only(method: Method, tokens: int) -> Policy:
    """The same budget with nothing left to choose, which no `Method` allows."""
    budget = method.tokens(tokens)
    return Policy(budget, method.sinks, budget - method.sinks)


def _rank(engine: Engine, job: Job) -> tuple[int | None, float | None]:
    """The rank that all layers need, and its error in the layer that needs it."""
    if not any(SETTINGS[name][1].get("rank") == CHOSEN for name in job.methods):
        return None, None
    text = _document(engine, job.setup, CALIBRATION_SEED)
    rank, error = max(low_rank(engine, text, RANKS, TOLERANCE))
    return rank, round(error, 3)


def _document(engine: Engine, setup: Setup, seed: int) -> Needles:
    return Needles.build(engine, tokens=setup.tokens, needles=setup.needles, seed=seed)


def spread(questions: Sequence[Any], count: int) -> list[Any]:
    """So many of them, about needles all over the text."""
    return [questions[i * len(questions) // count] for i in range(count)]


def run_all(jobs: list[Job]) -> list[Result]:
    """A process a core. The first failure ends it."""
    start, results = time.perf_counter(), []
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            results.append(done.result())
            spent = time.perf_counter() - start
            CONSOLE.print(f"{spent:.0f} s: {len(results)} of {len(jobs)} documents")
    return sorted(results, key=lambda result: jobs.index(result.job))


def merged(results: list[Result]) -> dict[tuple[str, float], Cell]:
    """The cells of one model, over its documents."""
    together = {}
    for at in results[0].cells:
        cells = [result.cells[at] for result in results]
        attended = sum(cell.attended for cell in cells) / len(cells)
        together[at] = Cell(sum((cell.right for cell in cells), ()), attended)
    return together


def share(cell: Cell) -> float:
    return sum(cell.right) / len(cell.right)


def budget_name(budget: float) -> str:
    return f"{budget:.2f}" if round(budget, 2) == budget else f"{budget:g}"


def summary(results: list[Result]) -> dict[str, Any]:
    """Shares of answers right: model, method, budget."""
    found: dict[str, Any] = {}
    for model, mine in by_model(results):
        cells = merged(mine)
        found[model] = {
            name: {budget_name(b): round(share(x), 4) for (n, b), x in cells.items() if n == name}
            for name in mine[0].job.methods
        }
        found[model]["dense"] = round(share(cells["dense", 1.0]), 4)
    tokens = sum(result.context_tokens for result in results)
    return found | {"context_tokens": round(tokens / len(results))}


def by_model(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    for model in dict.fromkeys(result.job.model for result in results):
        yield model, [result for result in results if result.job.model == model]


def show(results: list[Result]) -> None:
    """One table a model, on stdout."""
    out = Console(width=110, soft_wrap=True)
    for model, mine in by_model(results):
        job, cells = mine[0].job, merged(mine)
        dense = cells["dense", 1.0]
        table = Table(
            "method",
            *(f"{budget:.1%}" for budget in job.budgets),
            title=f"{model}: share right (tokens attended to per KV head and step), "
            f"{len(dense.right)} questions, {job.setup.needles} needles in {dense.attended:.0f} "
            f"tokens; dense {share(dense):.2f}",
            caption=caption(mine),
            caption_justify="left",
        )
        for name in job.methods:
            row = (cells[name, budget] for budget in job.budgets)
            table.add_row(name, *(f"{share(x):.2f} ({x.attended:.0f})" for x in row))
        out.print(table)


def caption(results: list[Result]) -> str:
    note = "0.5 % of 4,096 tokens are 20, sinks and window: the budget is 21 there, one is chosen."
    rank, error = results[0].rank, results[0].error
    chosen = f" Rank of shadowkv and lowrank+scalar+int4: {rank} of {RANKS[-1]}, error {error}."
    return note if rank is None else note + chosen


def record(results: list[Result], seconds: float) -> dict[str, Any]:
    """What a line of benchmarks/results/ holds."""
    found = facts(torch.device("cpu")) | {"benchmark": "needles", "seconds": round(seconds)}
    found |= {"sinks": Method().sinks, "window": Method().window, "tolerance": TOLERANCE}
    found |= {"threads": 1, "tail": True}  # threads of each document's process
    found |= {"summary": summary(results), "models": {}}
    for model, mine in by_model(results):
        found["models"][model] = mine[0].job.setup._asdict() | {
            "seeds": [result.job.seed for result in mine],
            **{"rank": mine[0].rank, "rank_error": mine[0].error},
            "cells": [
                {"method": name, "budget": budget, "attended": x.attended}
                | {"right": sum(x.right), "asked": len(x.right)}
                for (name, budget), x in merged(mine).items()
            ],
        }
    return found


def main() -> None:
    options = _options()
    setup = Setup(4096, 32, options.documents, min(options.questions, 32))
    if options.long:  # fewer needles a text: these models cannot tell more apart there
        setup = Setup(16384, 8, options.documents, min(options.questions, 8))
    start = time.perf_counter()
    what, seeds = (setup, options.methods, options.budgets), range(setup.documents)
    results = run_all([Job(m, seed, *what) for m in options.models for seed in seeds])
    line = record(results, time.perf_counter() - start)
    name = "needles_long" if options.long else "needles"
    finish(name, line, options, summary(results), lambda: show(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_outputs(parser)
    parser.add_argument("--quick", action="store_true", help="one document, few of everything")
    parser.add_argument("--long", action="store_true", help="8 needles in 16,384 tokens instead")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=[*SETTINGS, "all"], metavar="METHOD")
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the context's tokens")
    parser.add_argument("--questions", type=int, help="of each document")
    parser.add_argument("--documents", type=int)
    options = parser.parse_args()
    usual = [name for name in SETTINGS if name not in ON_REQUEST]
    options.methods = options.methods or (usual[:3] if options.quick else usual)
    if "all" in options.methods:
        options.methods = list(SETTINGS)
    options.budgets = options.budgets or (BUDGETS[1:4:2] if options.quick else BUDGETS)
    options.questions = options.questions or (8 if options.quick else 20)
    options.documents = options.documents or (1 if options.quick else 2)
    counts = options.questions, options.documents
    if min(counts) < 1 or not all(0 < budget < 1 for budget in options.budgets):
        parser.error("--questions and --documents are at least 1, --budgets between 0 and 1")
    return options


if __name__ == "__main__":
    main()
