"""Examine a model that was trained here: `python -m evals.training models/reference`."""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from engine.errors import ConfigError, EngineError
from evals.training.corpus import load_corpus
from evals.training.exam import Exam
from evals.training.network import load
from evals.training.tasks import TASKS


def main(words: list[str] | None = None) -> int:
    """One JSON line for every length, of the tasks that it has room for; 1 where it cannot."""
    args = _arguments(words)
    try:
        _check(args)
        network, corpus = load(args.model), load_corpus(args.text)
        exam = Exam(corpus, AutoTokenizer.from_pretrained(args.model), tuple(args.tasks))
        for length in args.lengths:
            marks = exam.mark(network, length, args.windows)
            if not marks:
                raise ConfigError(f"{length} tokens have no room for an answer: take more")
            print(json.dumps({"length": length, "windows": args.windows} | marks), flush=True)
    except EngineError as error:
        print(f"evals.training: {error}", file=sys.stderr)
        return 1
    return 0


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.training", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[], help="as in the training")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--windows", type=int, default=20, help="of each task and length")
    return parser.parse_args(words)


def _check(args: argparse.Namespace) -> None:
    """ConfigError for numbers that nothing can be examined with."""
    if args.windows < 1:
        raise ConfigError(f"--windows must be at least 1, got {args.windows}")
    if min(args.lengths) < 1:
        raise ConfigError(f"--lengths are tokens, at least 1, got {min(args.lengths)}")


if __name__ == "__main__":
    sys.exit(main())
