"""Which documents were added, and the chunks they are made of: a file that several may share."""

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from engine.errors import EngineError
from native.folders import sync_folder

VERSION = 1
FILE = "rag-{}.jsonl"


class CatalogueError(EngineError):
    """The catalogue is damaged, of another version, or cannot be reached."""


class Chunk(msgspec.Struct, frozen=True):
    """A part of a document. Its id follows from its tokens, those of the title included."""

    id: str
    text: str
    tokens: tuple[int, ...]


class Document(msgspec.Struct, frozen=True, tag="document"):
    """What was added under one id."""

    id: str
    title: str
    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Origin(msgspec.Struct, frozen=True, tag="origin"):
    """What the KV of chunks was computed behind, and in which blocks: part of its names."""

    prefix: tuple[int, ...]
    block_tokens: int


class Doomed(msgspec.Struct, frozen=True, tag="doomed"):
    """A chunk of no document any more, whose KV is still to be deleted."""

    id: str
    tokens: tuple[int, ...]


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    """A stored block of a prompt that was computed whole, from which on it rests on a chunk."""

    chunk: str
    block: str  # digest in hex


class Head(msgspec.Struct, frozen=True, tag="head"):
    """First line of a file; another generation is another file, however alike."""

    version: int
    generation: str


Row = Head | Document | Origin | Doomed | Trace


class Catalogue:
    """Documents by id, chunks by id. For one thread at a time; other processes may use the file.

    The file is JSON lines. What is new is appended; what changes or goes is written anew with all
    that stays, in one step, so that no text of a deleted document is left. A process that is killed
    leaves a whole file, or a last line that is cut off and ignored.

    Args:
        path: the file; None keeps everything in memory.
    Raises:
        CatalogueError: the file is damaged or cannot be read.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.documents: dict[str, Document] = {}
        self.chunks: dict[str, Chunk] = {}
        self.owners: dict[str, dict[str, Chunk]] = {}  # documents of a chunk, in words of their own
        self.origins: dict[Origin, None] = {}
        self.doomed: dict[str, Doomed] = {}
        self.traces: dict[Trace, None] = {}
        self._generation = ""
        self._read = 0  # bytes of the file

    def refresh(self) -> None:
        """Learn what others have changed."""
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                self._catch_up(file)
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise CatalogueError(f"cannot read {self._path}: {error.strerror}") from error

    def _catch_up(self, file: BinaryIO) -> None:
        head = file.readline()
        generation = self._head(head).generation
        cut = file.seek(0, os.SEEK_END) < self._read  # by who could not write all of a line, or so
        if cut or generation != self._generation:
            self._forget()
            self._generation, self._read = generation, len(head)
        file.seek(self._read)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # somebody may be writing a line
        for line in whole.splitlines():
            self._take(self._row(line))
        self._read += len(whole)

    def add(self, documents: Sequence[Document], origin: Origin) -> None:
        """Add documents, or put them in the place of those with the same ids."""
        with self._changing():
            new = [d for d in documents if self.documents.get(d.id) != d]
            rows: list[Row] = [] if origin in self.origins else [origin]
            if any(d.id in self.documents for d in new):
                self._remove(d.id for d in new)
                for row in (*rows, *new):
                    self._take(row)
                self._rewrite()
            else:
                self._append([*rows, *new])

    def remember(self, origin: Origin) -> None:
        """Take note of an origin, before KV of it is stored."""
        if origin not in self.origins:
            self.add([], origin)

    def remove(self, ids: Iterable[str]) -> None:
        """Remove documents; those of their chunks that no other document has become `doomed`."""
        with self._changing():
            self._remove(ids)
            self._rewrite()

    def note(self, traces: Iterable[Trace]) -> None:
        """Take note of traces that are not known yet."""
        if new := [trace for trace in traces if trace not in self.traces]:
            with self._changing():
                self._append(new)

    def settle(
        self,
        doomed: Iterable[str] = (),
        traces: Iterable[Trace] = (),
        *,
        evicted: Iterable[Trace] = (),
        origins: Iterable[Origin] = (),
    ) -> None:
        """Forget doomed chunks and their traces, as their KV is deleted; but no trace of a chunk
        that came again meanwhile, whose prompts may be stored again. And all traces and origins
        of which nothing is stored any more."""
        with self._changing():
            for origin in origins:
                self.origins.pop(origin, None)
            for id_ in doomed:
                self.doomed.pop(id_, None)
            for trace in (*(t for t in traces if t.chunk not in self.chunks), *evicted):
                self.traces.pop(trace, None)
            self._rewrite()

    # what is known

    def _take(self, row: Row) -> None:
        if isinstance(row, Document):
            self._remove([row.id])
            self.documents[row.id] = row
            for chunk in row.chunks:
                self.chunks.setdefault(chunk.id, chunk)
                self.owners.setdefault(chunk.id, {}).setdefault(row.id, chunk)
                self.doomed.pop(chunk.id, None)
        elif isinstance(row, Origin):
            self.origins[row] = None
        elif isinstance(row, Trace):
            self.traces[row] = None
        elif isinstance(row, Doomed) and row.id not in self.chunks:
            self.doomed[row.id] = row

    def _remove(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            document = self.documents.pop(id_, None)
            own = {chunk.id: chunk for chunk in document.chunks} if document else {}
            for chunk in own.values():
                left = self.owners[chunk.id]
                del left[id_]
                if left:  # the chunk in their words: tokenizers may make the same tokens of others
                    self.chunks[chunk.id] = next(iter(left.values()))
                else:
                    del self.owners[chunk.id], self.chunks[chunk.id]
                    self.doomed[chunk.id] = Doomed(chunk.id, chunk.tokens)

    # the file

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the file, and knowing all of it."""
        if self._path is None:
            yield
            return
        try:
            with _alone(self._path):
                self.refresh()
                try:
                    yield
                except BaseException:
                    self._forget()  # what was not written is not so
                    raise
        except OSError as error:
            raise CatalogueError(f"cannot write {self._path}: {error.strerror}") from error

    def _append(self, rows: Sequence[Row]) -> None:
        if self._path is None or not self._path.exists():
            for row in rows:
                self._take(row)
            self._rewrite()
            return
        try:
            with self._path.open("r+b") as file:
                file.truncate(self._read)  # what a killed process left of a line
                file.seek(self._read)
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._take_back(self._path)
            raise
        self.refresh()

    def _take_back(self, path: Path) -> None:
        """Cut off what could not be written. Who has read it meanwhile reads all anew."""
        with path.open("r+b") as file:
            file.truncate(self._read)
            file.write(_lines([_new_head()]))  # as long as the old one, so it needs no room

    def _rewrite(self) -> None:
        """All that is known as a new file, in the place of the old one."""
        if self._path is None:
            return
        head = _new_head()
        documents, doomed = self.documents.values(), self.doomed.values()
        lines = _lines([head, *self.origins, *documents, *doomed, *self.traces])
        new = self._path.with_suffix(".new")  # a killed one is overwritten, so its text goes, too
        new.unlink(missing_ok=True)
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(self._path.parent)
        self._generation, self._read = head.generation, len(lines)

    def _head(self, line: bytes) -> Head:
        row = self._row(line)
        if not isinstance(row, Head) or row.version != VERSION:
            raise CatalogueError(f"{self._path} is no catalogue of version {VERSION}: move it away")
        return row

    def _row(self, line: bytes) -> Row:
        try:
            return msgspec.json.decode(line, type=Row)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CatalogueError(
                f"{self._path} is damaged ({error}): delete it, and add the documents again"
            ) from error


def catalogues(folder: Path) -> list[Path]:
    """The files of all catalogues in a folder, of every tenant and model.

    Of one whose first documents were being written when its process was killed, only what
    `discard` deletes beside it is there.
    """
    unfinished = [new.with_suffix(".jsonl") for new in folder.glob("rag-*.new")]
    return sorted({*folder.glob(FILE.format("*")), *unfinished})


def discard(path: Path) -> None:
    """Delete a catalogue, whoever uses it. Its documents' KV stays. CatalogueError if it cannot."""
    try:
        with _alone(path):
            path.unlink(missing_ok=True)
            path.with_suffix(".new").unlink(missing_ok=True)
    except OSError as error:
        raise CatalogueError(f"cannot delete {path}: {error.strerror}") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The only one, of all threads and processes, to change the file at `path`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    door = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(door, fcntl.LOCK_EX)
        yield
    finally:
        os.close(door)


def _new_head() -> Head:
    return Head(VERSION, secrets.token_hex(16))


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
