#!/usr/bin/env python3
"""What blending loses, by policy and by the share of reused tokens that it computes afresh.

    python scripts/bench_blend_quality.py [--json] [--save] [--plot PNG] [--quick] [--model DIR]

Prompts of the suite `rag`, whose chunks are cached one by one and read from the store; see
`evals/rag.py`. KL: divergence of the answer's first token, after a full prefill from that after the
blend, in nats, mean over prompts. Right: share of greedy answers with the value.

two hops     a chunk's fact refers to one of an earlier chunk: what a chunk alone cannot know
single hop   each fact stands in one chunk
real text    questions of MuSiQue and their paragraphs, from $HEADRACE_DATA; KL only

A share is charged in tokens times layers, probes and check layers included
(`engine/blend/policies.py`).
A share that a policy cannot spend, or must exceed, is left empty: so is every share but 0 of
`reposition`, and of `deviation` all below that of its check layers. Where a probe would take most
of a share, boundaries are repaired instead (`engine/blend/blend.py`).
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from bench_common import add_outputs, facts, finish
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.blend.repair import BlendConfig, BlendReport, PolicyName
from engine.blend.reuse import BLOCK_TOKENS
from engine.engine import Engine
from engine.errors import EngineError
from evals.blended import Reading, answer, blended, in_full
from evals.rag import RagSuite
from evals.task import Sample

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
DEFAULT, RIVAL = BlendConfig().policy, "deviation"
SHARES = tuple(step / 20 for step in range(13))  # 0 to 0.6
TARGET = 0.5  # of the rival's KL
CONSOLE = Console(stderr=True, soft_wrap=True)


class Input(NamedTuple):
    """Prompts of a task; scored, where a model of this size can answer them."""

    title: str
    task: str
    tokens: int
    scored: bool


INPUTS = {
    "two_hop": Input("two hops", "two-hop", 1536, True),
    "single_hop": Input("single hop", "single-plain", 1536, True),
    "real_text": Input("real text", "musique", 2048, False),
}


class Point(NamedTuple):
    """One prompt, blended."""

    kl: float
    charged: float
    right: bool | None


Points: TypeAlias = "dict[tuple[PolicyName, float], list[Point]]"
Rows: TypeAlias = "dict[str, dict[str, dict[str, float]]]"


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, and the prompts that it is asked."""

    engine: Engine
    suite: RagSuite
    samples: int

    def measure(self, name: str) -> dict[str, Any]:
        """Every policy at every share that it reached on all prompts, and the full prefill."""
        given, full = INPUTS[name], list[bool | None]()
        points: Points = {(policy, share): [] for policy in POLICIES for share in SHARES}
        drawn = self.suite.samples(self.engine.tokenizer, given.task, given.tokens, self.samples)
        for number, sample in enumerate(drawn, 1):
            with in_full(self.engine, sample) as reading:
                full.append(self._right(sample, reading))
                points = dict(self._points(sample, reading, points))
            CONSOLE.print(f"{given.title} {number}/{self.samples}")
        rows: Rows = {policy: {} for policy in POLICIES}
        for (policy, share), found in points.items():
            rows[policy][f"{share:g}"] = _mean(found)
        right = {"right": statistics.fmean(map(bool, full))} if given.scored else {}
        return {"rows": rows, "full": right, "compare": compare(rows)}

    def _points(
        self, sample: Sample, reading: Reading, points: Points
    ) -> Iterator[tuple[tuple[PolicyName, float], list[Point]]]:
        """What is known so far with this prompt; without what a policy does not reach."""
        for (policy, share), found in points.items():
            config = BlendConfig(policy=policy, share=share, controller=False)
            with blended(self.engine, sample, config) as other:
                assert other.report is not None
                if _reached(other.report, share):
                    kl, right = reading.distance(other), self._right(sample, other)
                    yield (policy, share), [*found, Point(kl, other.report.charged, right)]

    def _right(self, sample: Sample, reading: Reading) -> bool | None:
        if not any(x.scored for x in INPUTS.values() if x.task == sample.task):
            return None
        return self.suite.score(sample, 0, answer(self.engine, reading)) == 100


def _reached(report: BlendReport, share: float) -> bool:
    """Whether a share was spent, to a block: they are whole."""
    return share - BLOCK_TOKENS / max(1, report.reused_tokens) < report.charged <= share + 1e-9


def _mean(found: list[Point]) -> dict[str, float]:
    means = {name: statistics.fmean(getattr(x, name) for x in found) for name in ("kl", "charged")}
    if found[0].right is not None:
        means["right"] = statistics.fmean(bool(x.right) for x in found)
    return means


def compare(rows: Rows) -> dict[str, float] | None:
    """The default policy and its rival at the smallest share that both reach; None without one."""
    both = [share for share in rows[DEFAULT] if share in rows[RIVAL]]
    if not both:
        return None
    share = min(both, key=float)
    kls = {f"{name}_kl": rows[p][share]["kl"] for name, p in _compared()}
    return {"share": float(share)} | kls


def _compared() -> Iterable[tuple[str, str]]:
    return (RIVAL, RIVAL), ("default", DEFAULT)


def summary(inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Two hops, if measured, and the other inputs by name."""
    shown = {name: _short(found) for name, found in inputs.items()}
    return shown.pop("two_hop", {}) | shown


def _short(found: dict[str, Any]) -> dict[str, Any]:
    rows = {
        policy: {
            share: {k: round(v, 5) for k, v in point.items() if k != "charged"}
            for share, point in points.items()
        }
        for policy, points in found["rows"].items()
    }
    return rows | {key: found[key] for key in ("full", "compare")}


def show(record: dict[str, Any]) -> None:
    """KL and answers, a table for every input."""
    out = Console(width=130, soft_wrap=True)
    for name, found in record["inputs"].items():
        given = INPUTS[name]
        measures = ("kl", "right") if given.scored else ("kl",)
        for measure in measures:
            title = f"{given.title}: {'KL, nats' if measure == 'kl' else 'answers right'}"
            table = Table("policy", *(f"{share:g}" for share in SHARES), title=title)
            for policy, points in found["rows"].items():
                mark = " *" if policy == DEFAULT else ""
                table.add_row(policy + mark, *(_cell(points, share, measure) for share in SHARES))
            out.print(table)
        if given.scored:
            out.print(f"full prefill: {found['full']['right']:.2f} right")
        out.print(_verdict(found["compare"]))
    out.print(
        f"* the default. {record['samples']} prompts each, {record['seconds']:.0f} s, "
        f"{record['device']}, commit {record['commit']}"
    )


def _cell(points: dict[str, dict[str, float]], share: float, measure: str) -> str:
    point = points.get(f"{share:g}")
    return "" if point is None else f"{point[measure]:.{3 if measure == 'kl' else 2}f}"


def _verdict(found: dict[str, float] | None) -> str:
    if found is None:
        return f"{DEFAULT} and {RIVAL} reach no share in common"
    ours, theirs = found["default_kl"], found[f"{RIVAL}_kl"]
    met = "met" if ours <= TARGET * theirs else "missed"
    return (
        f"at {found['share']:g}, the smallest share that both reach: {DEFAULT} {ours:.4f}, "
        f"{RIVAL} {theirs:.4f} (target, at most {TARGET:g} of that: {met})"
    )


def plot(inputs: dict[str, dict[str, Any]], path: Path) -> None:
    """KL by share, a panel for every input."""
    pyplot: Any = importlib.import_module("matplotlib.pyplot")  # only who draws needs it
    figure, panels = pyplot.subplots(1, len(inputs), figsize=(5 * len(inputs), 3.4), squeeze=False)
    for panel, (name, found) in zip(panels[0], inputs.items(), strict=True):
        for policy, points in found["rows"].items():
            line = [float(share) for share in points], [x["kl"] for x in points.values()]
            width = 2.5 if policy == DEFAULT else 1.2
            panel.plot(*line, marker="o", markersize=3, linewidth=width, label=policy)
        panel.set(title=INPUTS[name].title, xlabel="charged share", yscale="log")
    panels[0][0].set_ylabel("KL of the first token, nats")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=75)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All inputs; real text where it is, or is asked for."""
    haystack = options.haystack and options.haystack.read_text(encoding="utf-8")
    suite = RagSuite(options.seed, haystack, options.musique)
    names = [name for name in INPUTS if name in options.inputs]
    if "real_text" in names and not (options.musique or os.environ.get("HEADRACE_DATA")):
        CONSOLE.print("no real text: it needs --musique, or HEADRACE_DATA")
        names.remove("real_text")
    with Engine.from_pretrained(
        options.model, dtype=torch.float32, device=options.device
    ) as engine:
        bench = Bench(engine, suite, options.samples)
        return {name: bench.measure(name) for name in names}


def main() -> int:
    options = _options()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        CONSOLE.print("drawing needs matplotlib: pip install headrace[evals], or leave out --plot")
        return 1
    start = time.perf_counter()
    record = facts(torch.device(options.device)) | {"benchmark": "blend_quality"}
    record |= {"model": Path(options.model).name, "samples": options.samples, "seed": options.seed}
    try:
        record["inputs"] = run(options)
    except (EngineError, OSError) as error:
        CONSOLE.print(str(error))
        return 1
    record |= {"default": DEFAULT, "seconds": time.perf_counter() - start}
    if options.plot:
        plot(record["inputs"], options.plot)
    finish("blend_quality", record, options, summary(record["inputs"]), lambda: show(record))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_outputs(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="to be drawn")
    parser.add_argument("--quick", action="store_true", help="4 prompts of each input")
    parser.add_argument("--samples", type=int, help="prompts of each input; 40")
    parser.add_argument("--seed", type=int, default=42, help="of the prompts")
    parser.add_argument("--model", default="reference", help="a folder, or one that comes along")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="text of made chunks")
    parser.add_argument("--musique", metavar="DATA", help="rows ($HEADRACE_DATA/musique)")
    options = parser.parse_args()
    options.samples = options.samples or (4 if options.quick else 40)
    return options


if __name__ == "__main__":
    sys.exit(main())
