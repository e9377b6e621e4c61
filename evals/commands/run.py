"""`headrace-eval run`: ask a model the questions of suites, and note what came of it."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from engine.errors import ConfigError
from evals.settings import RunSettings, read_settings, tokens

if TYPE_CHECKING:  # importing these takes seconds, which --help must not
    from engine.engine import Engine
    from evals.run import Run

EXAMPLES = """
examples:
  headrace-eval run --suite needle --lengths 4k,8k --limit 5 --out runs/first
  headrace-eval run --config run.toml --limit 100 --out runs/second
  headrace-eval report runs/first

run.toml, in which options have the names that they have here:
  model = "needle-tiny"
  suite = ["needle", "ruler", "fidelity:ruler"]
  tasks = ["niah_single_1", "vt"]
  method = ["headrace", "shadowkv", "oracle"]
  budget = [0.016, 256]
  lengths = ["4k", "8k"]
  [settings.shadowkv]        # of methods, see engine/method.py
  rank = 48

A run that was ended goes on when it is started again: what DIR has is not asked again, but for
what failed. dense runs in any case, as the ceiling, and so does each question without its context,
as the floor. The exit status is 1 if something could not be asked.
"""


def add(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.formatter_class, parser.epilog = RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument("--config", metavar="FILE", help="a run in TOML; options outdo it")
    parser.add_argument("--out", metavar="DIR", help="folder for records.jsonl and run.json")
    parser.add_argument("--dry-run", action="store_true", help="print one prompt, ask nothing")
    parser.add_argument("--json", action="store_true", help="the result as one JSON line")
    _add_plan(parser)
    _add_data(parser)
    _add_engine(parser)


def _add_plan(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument("--model", metavar="M", help="folder or hub id (needle-tiny)")
    group.add_argument(
        "--suite", metavar="S[,S]", type=_listed(str),
        help="needle, multiturn, extraction, rag, ruler, longbench, longbench-v2; fidelity:S or "
        "speed:S to measure on the samples of S, fidelity or speed on those of needle",
    )  # fmt: skip
    group.add_argument(
        "--method", metavar="M[,M]", type=_listed(str),
        help="dense, headrace, shadowkv, a2ats, quest, pqcache, oracle (dense,headrace)",
    )  # fmt: skip
    group.add_argument(
        "--budget", metavar="B[,B]", type=_listed(float),
        help="tokens that a KV head attends to, sinks and window included; below 1 the share of "
        "the prompt (0.016)",
    )  # fmt: skip
    group.add_argument(
        "--lengths", metavar="L[,L]", type=_listed(_tokens),
        help="tokens of prompts with their answers, as 4096 or 4k (4k)",
    )  # fmt: skip
    group.add_argument(
        "--tasks", metavar="T[,T]", type=_listed(str),
        help="of the suites, as needle-plain, niah_single_1, multi-turn-ruler; one that there is "
        "not is answered by all names there are (all)",
    )  # fmt: skip
    group.add_argument("--limit", metavar="N", type=int, help="samples of a task and length (20)")
    group.add_argument("--seed", metavar="S", type=int, help="of samples that are made (42)")
    group.add_argument(
        "--per-head", action="store_const", const=True,
        help="fidelity notes measures of every layer and KV head, too (in measures.csv of report)",
    )  # fmt: skip


def _add_data(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--haystack", metavar="FILE", help="text to hide needles in (Python's reference pages)"
    )
    rows = (("squad", "ruler's qa_1"), ("hotpotqa", "ruler's qa_2"), ("musique", "rag's musique"))
    for name, task in rows:
        group.add_argument(
            f"--{name}", metavar="DATA",
            help=f"rows of {task}: file, folder or hub id ($HEADRACE_DATA/{name})",
        )  # fmt: skip
    group.add_argument(
        "--longbench",
        metavar="DIR",
        help="files like hotpotqa.jsonl, or folders that `datasets` saved (the hub's)",
    )
    group.add_argument("--longbench-v2", metavar="DATA", help="data.json (the hub's)")


def _add_engine(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(the checkpoint's)"
    )
    group.add_argument("--device", help="cpu or cuda[:N] (a GPU if there is one)")
    group.add_argument("--cache-bytes", metavar="N", type=int, help="of dense KV at once (8 GiB)")
    group.add_argument(
        "--pinned-bytes", metavar="N", type=int, help="of sparse methods' KV at once (8 GiB)"
    )


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What reads values with commas between them."""

    def values(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    values.__name__ = f"list of {kind.__name__}"  # argparse says "invalid ... value"
    return values


def _tokens(text: str) -> int:
    try:
        return tokens(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error


def run(args: Namespace) -> int:
    """Do what is left to be done of a run; 1 if something could not be asked."""
    names = set(RunSettings.__struct_fields__) & vars(args).keys()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = read_settings(args.config, given)
    if args.dry_run:
        return _show_prompt(settings)
    if args.out is None:
        raise ConfigError("--out DIR is missing: where the run is to be noted")
    # torch and transformers take seconds
    from engine.commands.session import progress
    from evals.folder import facts, open_folder
    from evals.registry import haystack_text
    from evals.run import Run, plan
    from evals.ways import ways

    haystack = haystack_text(settings)
    chosen, cells = ways(settings), plan(settings, haystack)  # what is wrong is said at once
    with _engine(settings) as engine:
        with progress().status("hashing data"):
            made = facts(engine, settings, haystack)
        with closing(open_folder(args.out, made)) as journal:
            run = Run(engine, journal, cells, chosen, settings.limit, settings.per_head)
            _go(run, progress())
            return _summary(args, run)


def _engine(settings: RunSettings) -> "Engine":
    import torch

    from engine.commands.session import busy, quiet
    from engine.config import EngineConfig
    from engine.engine import Engine

    config = EngineConfig(cache_bytes=settings.cache_bytes, pinned_bytes=settings.pinned_bytes)
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    with busy(f"loading {settings.model}"):
        quiet()
        engine = Engine.from_pretrained(settings.model, config, dtype=dtype, device=settings.device)
    missing = None
    if engine.tokenizer is None:
        missing = "has no tokenizer: questions are texts"
    elif not all(layer.owns for layer in engine.model.layers):
        missing = "has layers that share KV: what a method costs is counted by layers of their own"
    if missing is not None:
        engine.close()
        raise ConfigError(f"{settings.model} {missing}")
    return engine


def _go(run: "Run", console: Console) -> None:
    """All steps, with a bar that knows what is left: its time is that of what was done now."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=console) as shown:
        total = run.tokens
        bar = shown.add_task("starting", total=total, failed="")
        for step in run.steps():
            failed = f"{run.journal.failures} failed" if run.journal.failures else ""
            if not step.new:
                total -= step.tokens
            advance = step.tokens if step.new else 0
            shown.update(
                bar, advance=advance, total=total, description=step.cell.shown, failed=failed
            )


def _summary(args: Namespace, run: "Run") -> int:
    records = run.journal.records
    errors = [record for record in records if record.error is not None]
    if args.json:
        found = {"out": args.out, "records": len(records), "errors": len(errors)}
        print(json.dumps(found))
    else:
        print(f"{len(records)} records in {args.out}: headrace-eval report {args.out} shows them")
    if errors:
        first = errors[0]
        print(
            f"headrace-eval: {len(errors)} of {len(records)} could not be asked, the first is "
            f"{first.id} by {first.method}: {first.error}",
            file=sys.stderr,
        )
    return 1 if errors else 0


def _show_prompt(settings: RunSettings) -> int:
    """The first sample's first prompt on stdout, as the model would read it."""
    from engine.commands.session import progress
    from engine.model.loader import load_tokenizer, locate
    from evals.prompt import ask
    from evals.run import plan
    from evals.ways import ways

    tokenizer = load_tokenizer(locate(settings.model))
    if tokenizer is None:
        raise ConfigError(f"{settings.model} has no tokenizer: questions are texts")
    ways(settings)  # says what is wrong with methods and budgets
    cell = plan(settings)[0]
    for sample in cell.suite.samples(tokenizer, cell.task, cell.length, 1):
        asked, turn = ask(tokenizer, sample)[0], sample.turns[0]
        print(tokenizer.decode([*asked.context, *asked.question]))
        progress().print(
            f"{sample.id}: {len(asked.context)} tokens of context, {len(asked.question)} of the "
            f"question, up to {turn.max_new_tokens} of the answer; right is {list(turn.outputs)}",
            soft_wrap=True,
        )
    return 0
