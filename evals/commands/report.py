"""`headrace-eval report`: what runs found, as tables, files, plots and one page."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from evals.report import tables
from evals.report.load import load_runs
from evals.report.summary import Summary, summarize
from evals.report.table import Table
from evals.report.terminal import show
from evals.report.write import write_report


def add(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "folders", metavar="DIR", nargs="+",
        help="folder of a run, ended or not; several are merged, if of one model",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="where the report is written (the first DIR): report.html, summary.md, summary.csv, "
        "summary.json, measures.csv and plots/*.png",
    )  # fmt: skip


def run(args: Namespace) -> int:
    """Print the tables, then write the report; 0 even where runs hold errors: they are shown."""
    summary = summarize(load_runs(args.folders))
    show(_tables(summary))
    page = write_report(summary, args.out or Path(args.folders[0]))
    print(f"report: {page}", file=sys.stderr)
    return 0


def _tables(summary: Summary) -> list[Table]:
    """Families last: they are what remains on the screen."""
    return [
        *tables.measures(summary),
        tables.cost(summary),
        tables.listed("Tasks", summary.cells),
        tables.gaps(summary),
        tables.failures(summary),
        tables.listed("Families", summary.families),
    ]
