"""Train the small model that evaluations are run on (models/reference).

Writes OUT/model, OUT/log.jsonl and OUT/checkpoint.pt every few minutes. Facts are hidden in the
reference pages of the Python that runs this, and in the texts that are given: for the model that
comes with the project, Project Gutenberg's War and Peace (number 2600). With --refine a model that
was trained so is trained on, by a recipe of what comes hardest.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from engine.errors import EngineError
from evals.ruler.templates import NEEDLE, NIAH, TRACING, singular
from evals.training.corpus import Corpus, load_corpus
from evals.training.exam import Exam
from evals.training.keys import HAYSTACK_KEYS
from evals.training.network import export, load
from evals.training.recipe import REFERENCE, REFINED, TINY
from evals.training.run import Training, train, write_line
from evals.training.vocabulary import build_tokenizer
from evals.training.windows import Windows

STEPS = 2000  # of 8,192 tokens: about an hour of one core
TINY_STEPS = 4
EXAM = {False: (512, 8), True: (160, 1)}  # tokens of a window, windows of a task


def main(words: list[str] | None = None) -> int:
    """The program; 1 where it cannot do what was asked."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(arguments(words))
    except EngineError as error:
        print(f"train_reference_model: {error}", file=sys.stderr)
        return 1
    return 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is written")
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        help="English to train on, repeatable",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the training ({STEPS})")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--refine", type=Path, metavar="MODEL", help="start from this model")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="fuse the network by torch.compile: a third quicker, after a minute",
    )
    parser.add_argument("--every", type=float, default=180.0, help="seconds between log lines")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to test the parts")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> None:
    corpus = load_corpus(args.text)
    start = load(args.refine) if args.refine else None
    tokenizer = tokenizer_of(args.refine or args.out / "model", corpus)
    recipe = TINY if args.tiny else REFINED if args.refine else REFERENCE
    training = Training(
        recipe.on(args.device),
        Windows(corpus, tokenizer),
        seed=args.seed,
        device=args.device,
        compiled=args.compile,
    )
    if start is not None:
        training.start_from(start)
    if args.resume:
        training.load(args.out / "checkpoint.pt")
    exam = Exam(corpus, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)

    def report(line: dict[str, Any]) -> None:
        marks = exam.mark(training.network, *EXAM[args.tiny])
        line["exam"] = {task: round(mark, 3) for task, mark in marks.items()}
        write_line(args.out / "log.jsonl", line)
        print(line, flush=True)

    def keep() -> None:
        training.save(args.out / "checkpoint.pt")
        export(training.network, tokenizer, args.out / "model", sharpness=recipe.sharpness)

    steps = TINY_STEPS if args.tiny else args.steps
    train(training, steps, every_s=args.every, report=report, keep=keep)


def tokenizer_of(folder: Path, corpus: Corpus) -> Any:
    """The one in `folder`, which is made of the corpus first where there is none."""
    if not (folder / "tokenizer.json").is_file():
        wordings = [*NIAH, *singular(NIAH), *TRACING, NEEDLE]
        wordings += [f" {key} is the same as {key}." for key in HAYSTACK_KEYS]
        sentences = [sentence for text in corpus.trained for sentence in text]
        build_tokenizer([*sentences, *wordings * 3000]).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
