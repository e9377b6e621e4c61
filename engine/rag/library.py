"""What an engine has read: documents on record, found by a retriever, forgotten with their KV."""

import hmac
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from engine.blend.segments import Segments
from engine.engine import Engine
from engine.errors import ConfigError, PromptError
from engine.rag.answer import Citation
from engine.rag.catalogue import FILE, Catalogue, Document, Origin
from engine.rag.documents import Source, read
from engine.rag.forget import Forgetting
from engine.rag.retriever import Hit, Retriever
from engine.request import Completion
from engine.splitter import BREAK, Piece


class Unknown(PromptError):
    """There is no such document or chunk; who else may have one does not show."""


class Cited(NamedTuple):
    """A chunk that goes into a prompt."""

    citation: Citation
    tokens: tuple[int, ...]


class Library:
    """Documents of an engine's tenant and model. May be used from several threads.

    Args:
        engine: with a tokenizer.
        prefix: tokens that chunks are computed behind.
        chunk_tokens: of a chunk at most, its document's title included.
        folder: of the catalogue; None for the disk tier's, and without that memory only.
    Raises:
        ConfigError: the model has no room for a chunk.
        ModelError: the model's KV cannot be moved.
        CatalogueError: the catalogue is damaged or cannot be read.

    Attributes:
        separator: tokens between chunks.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        *,
        prefix: tuple[int, ...],
        chunk_tokens: int,
        folder: str | Path | None = None,
    ) -> None:
        engine.blending.refuse()
        self.separator = tuple(engine.splitter.encode(BREAK))
        positions = engine.model.shape.max_positions
        needed = len(prefix) + chunk_tokens + len(self.separator) + 1
        if chunk_tokens < 1 or needed > positions:
            raise ConfigError(
                f"chunk_tokens = {chunk_tokens} needs {needed} positions with instructions and a "
                f"question, the model has {positions}: choose a number from 1 up that fits"
            )
        self._engine, self._retriever, self._chunk_tokens = engine, retriever, chunk_tokens
        self._indexed: dict[str, tuple[str, str]] = {}  # title and text, as the retriever has them
        self._origin = Origin(prefix, engine.config.block_tokens)
        self._reading: Counter[Origin] = Counter()  # by prompts that run
        self._lock = threading.RLock()  # guards all others; not held while the engine computes
        self._catalogue = Catalogue(catalogue_file(engine, folder))
        self._forgetting = Forgetting(engine, self._catalogue)
        self._finish()

    def read(self, sources: Source | Iterable[Source]) -> list[Document]:
        """Documents cut into chunks, on no record yet. PromptError for an empty one."""

        def cut(text: str, title: str) -> list[Piece]:
            return self._engine.splitter.split(text, limit=self._chunk_tokens, title=title)

        return read(sources, cut)

    def documents(self) -> list[Document]:
        """All documents, in the order in which they came."""
        with self._lock:
            self._catalogue.refresh()
            return list(self._catalogue.documents.values())

    def document(self, id_: str) -> Document:
        """One document. Unknown: there is none."""
        with self._lock:
            self._catalogue.refresh()
            if id_ not in self._catalogue.documents:
                raise Unknown(f"there is no document {id_!r}")
            return self._catalogue.documents[id_]

    def add(self, documents: Sequence[Document]) -> None:
        """Put documents on record, in the place of those with the same ids.

        Raises:
            PromptError: the model cannot read a chunk; nothing was added.
        """
        for document in documents:
            for chunk in document.chunks:
                self._engine.blending.chunks.check(self._origin.prefix, chunk.tokens)
        with self._lock:
            self._catalogue.add(documents, self._origin)

    def delete(self, ids: Sequence[str]) -> int:
        """Forget documents; how many chunks no other document has. Unknown: an id is.

        KV that an earlier deletion left, as the store failed, goes in any case.
        """
        with self._lock:
            self._catalogue.refresh()
            unknown = [id_ for id_ in ids if id_ not in self._catalogue.documents]
            if not unknown:
                self._catalogue.remove(ids)
        count = self._finish()
        if unknown:
            raise Unknown(f"there is no document {unknown[0]!r}: nothing was deleted")
        return count

    def _finish(self) -> int:
        """Delete the KV of chunks that are doomed; how many. Others have their turns meanwhile."""
        with self._lock:
            doomed = self._forgetting.doomed()
        if doomed.names:
            self._engine.store.delete(doomed.names)
        with self._lock:
            self._forgetting.gone(doomed)
        return len(doomed.chunks)

    def search(self, question: str, top_k: int) -> list[Hit]:
        """The chunks that the retriever finds, best first."""
        if top_k < 1:
            raise PromptError(f"top_k must be at least 1, got {top_k}")
        with self._lock:
            self._index()
            return self._retriever.search(question, top_k)

    def find(self, question: str, top_k: int) -> list[Cited]:
        """The chunks for a question. PromptError where there is none."""
        with self._lock:
            hits = self.search(question, top_k)
            if not self._catalogue.documents:
                raise PromptError("there are no documents yet: add some")
            if not hits:
                raise PromptError(
                    "no chunk fits the question: use the documents' words, or name the chunks"
                )
            return [self._cited(*hit) for hit in hits]

    def named(self, ids: str | Iterable[str]) -> list[Cited]:
        """Chunks by their ids, or one. PromptError for an unknown one, or none at all."""
        with self._lock:
            self._catalogue.refresh()
            named = [ids] if isinstance(ids, str) else ids
            if found := [self._cited(id_, None) for id_ in named]:
                return found
        raise PromptError("chunks is empty: name at least one, or leave it out for a search")

    def parts(self, id_: str) -> list[Cited]:
        """The chunks of a document, or the one chunk, with this id. Unknown: there is none."""
        with self._lock:
            self._catalogue.refresh()
            document = self._catalogue.documents.get(id_)
            ids = [id_] if document is None else [chunk.id for chunk in document.chunks]
            return [self._cited(one, None) for one in ids]

    def before_reading(self, prefix: tuple[int, ...] | None = None) -> None:
        """Note where KV of chunks is about to be stored; `asked` must follow, or `withdrawn`.

        Args:
            prefix: that the prompt's chunks stand behind; None is the library's own.
        """
        with self._lock:
            origin = self._behind(prefix)
            self._catalogue.refresh()
            self._catalogue.remember(origin)
            self._forgetting.prune({self._origin, origin, *self._reading})
            self._reading[origin] += 1

    def withdrawn(self, prefix: tuple[int, ...] | None = None) -> None:
        """What `before_reading` announced did not run: nothing was stored."""
        with self._lock:
            self._read_no_more(self._behind(prefix))

    def stored(self, chunks: Mapping[str, Sequence[int]]) -> None:
        """KV of chunks was stored: delete what was deleted in the meantime."""
        with self._lock:
            self._put_behind(self._origin)
            self._forgetting.after(chunks)

    def asked(
        self,
        segments: Segments,
        ids: Sequence[str | None],
        generated: Sequence[int],
        done: Completion | None,
    ) -> None:
        """A prompt of chunks has ended, and may have left KV: see `Forgetting.note`."""
        with self._lock:
            origin = self._behind(segments.prefix)
            self._read_no_more(origin)
            self._put_behind(origin)
            self._forgetting.note(segments, ids, generated, done)
            pairs = zip(ids, segments.chunks, strict=True)
            self._forgetting.after({id_: chunk for id_, chunk in pairs if id_ is not None})

    def _put_behind(self, origin: Origin) -> None:
        """KV was stored behind it, which other processes did not see coming when they pruned."""
        self._catalogue.refresh()
        self._catalogue.remember(origin)

    def _read_no_more(self, origin: Origin) -> None:
        self._reading[origin] -= 1
        self._reading += Counter()  # without those that nobody reads

    def _behind(self, prefix: tuple[int, ...] | None) -> Origin:
        return self._origin if prefix is None else Origin(prefix, self._origin.block_tokens)

    def _cited(self, id_: str, score: float | None) -> Cited:
        if id_ not in self._catalogue.chunks:
            raise Unknown(
                f"there is no chunk {id_!r}: it was never added, or its documents are deleted"
            )
        chunk, owners = self._catalogue.chunks[id_], tuple(self._catalogue.owners[id_])
        return Cited(Citation(id_, owners, self._title(id_), chunk.text, score), chunk.tokens)

    def _title(self, chunk: str) -> str:
        return self._catalogue.documents[next(iter(self._catalogue.owners[chunk]))].title

    def _index(self) -> None:
        """Tell the retriever what came and what went."""
        self._catalogue.refresh()
        chunks = self._catalogue.chunks
        known = {id_: (self._title(id_), chunk.text) for id_, chunk in chunks.items()}
        if gone := [id_ for id_, said in self._indexed.items() if known.get(id_) != said]:
            self._retriever.remove(sorted(gone))
            self._leave_out(gone)
        if new := {id_: said for id_, said in known.items() if id_ not in self._indexed}:
            self._indexed |= new  # some of them may be, whatever goes wrong
            try:
                self._retriever.add(list(new), ["\n".join(said) for said in new.values()])
            except BaseException:
                self._retriever.remove(list(new))
                self._leave_out(new)
                raise

    def _leave_out(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            del self._indexed[id_]


def catalogue_file(engine: Engine, folder: str | Path | None) -> Path | None:
    """Where the catalogue of this tenant and model is: nobody else can tell its name."""
    folder = engine.config.store.disk_path if folder is None else folder
    if folder is None:
        return None
    secret = sha256(b"headrace rag 1" + engine.config.tenant.encode()).digest()
    name = hmac.digest(secret, engine.identity.digest, "sha256").hex()[:32]
    return Path(folder).absolute() / FILE.format(name)
