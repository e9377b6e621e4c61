"""`headrace rag`: read documents once, and ask about them in any order."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from engine.commands.session import decoded, open_engine, progress
from engine.errors import ConfigError, PromptError
from engine.rag.documents import files, read_file
from engine.unicode import check_unicode

if TYPE_CHECKING:
    from engine.rag import Rag
    from engine.rag.answer import Answer, Step


def run(args: Namespace) -> int:
    if args.no_store:
        raise ConfigError("documents are kept in the store: leave --no-store out")
    from engine.rag import Rag

    with open_engine(args) as engine:
        settings = {name: getattr(args, name, None) for name in ("policy", "share")}
        rag = Rag(engine, args.chunk_tokens, prefix=args.instructions, **settings)
        {"add": _add, "ask": _ask, "list": _list, "delete": _delete}[args.action](args, rag)
    return 0


def _add(args: Namespace, rag: "Rag") -> None:
    if "" in args.paths:
        raise PromptError("a path is empty: name a text file, or a folder of them")
    named = [file for path in args.paths for file in _files(Path(path))]
    paths = list({path.resolve(): path for path in named}.values())
    if not paths:
        raise PromptError(f"there is no text in {', '.join(args.paths)}")
    with Progress(console=progress(), transient=True) as bar:
        task = bar.add_task(f"reading {len(paths)} documents", total=None)
        chunks = rag.add(
            paths, progress=lambda done, of: bar.update(task, completed=done, total=of)
        )
    if args.json:
        print(json.dumps({"documents": [str(path.resolve()) for path in paths], "chunks": chunks}))
    else:
        print(f"{len(paths):,} documents in {len(chunks):,} chunks")


def _files(path: Path) -> Iterator[Path]:
    """A file, or those in a folder that are texts; which are not, is said."""
    if not path.is_dir():
        yield path
        return
    for file in files(path):
        try:
            text = read_file(file)
            check_unicode(str(file), f"the name of {os.fsencode(file)!r}")
        except PromptError as error:
            progress().print(f"left out: {error}", style="yellow", soft_wrap=True)
            continue
        if text.strip():
            yield file
        else:
            progress().print(f"left out: {file} is empty", style="yellow", soft_wrap=True)


def _ask(args: Namespace, rag: "Rag") -> None:
    question = decoded(os.fsencode(args.question), "the question")
    names = ("max_new_tokens", "temperature", "top_p", "seed", "stop")
    options = {name: getattr(args, name) for name in names}
    if args.top_k:
        raise ConfigError("rag ask has no --top-k: use --top-p, or --chunks for how many are read")
    if args.chunks is not None and args.chunks < 1:
        raise ConfigError(f"--chunks is a number from 1 up, got {args.chunks}")
    answer = _shown(rag.stream(question, args.chunk, top_k=args.chunks, **options), args.json)
    if args.json:
        print(json.dumps(asdict(answer) | {"ttft_s": answer.ttft_s}), flush=True)
    else:
        _cite(answer)


def _shown(steps: Iterator["Step"], as_json: bool) -> "Answer":
    """Print a text while it comes."""
    begun = False
    for step in steps:
        text = step.text if begun else step.text.lstrip()
        begun = begun or bool(text)
        if not as_json:
            print(text, end="", flush=True)
    assert step.answer is not None, "a stream ends with an answer"
    if not as_json:
        print(flush=True)
    return step.answer


def _cite(answer: "Answer") -> None:
    """The chunks that were read, and what was reused, to stderr."""
    for citation in answer.citations:
        said = f"{citation.chunk}  {citation.documents[0]}"
        progress().print(said, style="dim", soft_wrap=True)
    report, reused = answer.report, answer.stats.cached_tokens
    progress().print(
        f"{report.prompt_tokens:,} prompt tokens, {reused:,} of them reused and "
        f"{report.charged:.0%} of the moved ones computed afresh; first token after "
        f"{answer.ttft_s:.3f} s; {report.reason}",
        style="dim",
        soft_wrap=True,
    )


def _list(args: Namespace, rag: "Rag") -> None:
    for document in rag.documents():
        chunks = len(document.chunks)
        if args.json:
            about = {"id": document.id, "title": document.title, "tokens": document.tokens}
            print(json.dumps(about | {"chunks": [chunk.id for chunk in document.chunks]}))
        else:
            print(f"{document.id}  {chunks:,} chunks, {document.tokens:,} tokens")
    sys.stdout.flush()


def _delete(args: Namespace, rag: "Rag") -> None:
    known = {document.id for document in rag.documents()}
    named = [id_ if id_ in known else str(Path(id_).resolve()) for id_ in args.ids]
    ids = list(dict.fromkeys(named))
    chunks = rag.delete(ids)
    if args.json:
        print(json.dumps({"documents": ids, "chunks": chunks}))
    else:
        print(f"{len(ids):,} documents and {chunks:,} chunks deleted")
