"""Documents as people have them: texts, records with a title, files."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.errors import PromptError
from engine.rag.catalogue import Chunk, Document
from engine.splitter import Piece
from engine.unicode import check_unicode

Source = str | Path | Mapping[str, str]  # a text; a file; "text" with an "id" and a "title"
FIELDS = {"id", "title", "text"}


def read(
    sources: Source | Iterable[Source], cut: Callable[[str, str], list[Piece]]
) -> list[Document]:
    """Documents with their chunks, in the order given; the same one twice is one.

    A file's id is its absolute path and its title its name; a text without an id has its hash.

    Args:
        cut: a text and its title into pieces.
    Raises:
        PromptError: an empty document, one id for two of them, a file that cannot be read.
    """
    found: dict[str, Document] = {}
    for source in _listed(sources):
        id_, title, text = _parts(source)
        pieces = cut(text, title)
        if not pieces:
            raise PromptError(f"document {id_!r} is empty: nothing was added")
        chunks = (Chunk(chunk_id(piece.tokens), piece.text, piece.tokens) for piece in pieces)
        document = Document(id_, title, tuple(chunks))
        if found.setdefault(id_, document) != document:
            raise PromptError(f"two documents have the id {id_!r}: nothing was added")
    return list(found.values())


def chunk_id(tokens: Sequence[int]) -> str:
    """The name of a chunk: a hash of its tokens."""
    return hashlib.sha256(np.asarray(tokens, "<u4").tobytes()).hexdigest()[:32]


def files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, by name. PromptError where there is none."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [p for p in found if not any(part[0] == "." for part in p.relative_to(folder).parts)]
    if not shown:
        raise PromptError(f"there is no file in {folder}")
    return shown


def read_file(path: Path) -> str:
    """A text file. PromptError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 text: convert it first") from error
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}") from error


def _listed(sources: Source | Iterable[Source]) -> Iterator[Source]:
    if isinstance(sources, str | Path | Mapping):
        yield sources
    else:
        yield from sources


def _parts(source: Source) -> tuple[str, str, str]:
    """Id, title and text."""
    if isinstance(source, Path):
        text = read_file(source)
        check_unicode(str(source.resolve()), f"the name of {os.fsencode(source)!r}")
        return str(source.resolve()), source.name, text
    if isinstance(source, str):
        return _hash(source), "", source
    if unknown := source.keys() - FIELDS:
        raise PromptError(f"a document has {', '.join(sorted(FIELDS))}, not {sorted(unknown)[0]!r}")
    if "text" not in source or not all(isinstance(value, str) for value in source.values()):
        raise PromptError("a document needs a 'text'; it, 'id' and 'title' are strings")
    text, title = source["text"], source.get("title", "")
    check_unicode(source.get("id", ""), "a document's id")
    return source.get("id") or _hash(f"{title}\0{text}"), title, text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
