"""Documents for prompts that come from elsewhere: read once, and put into any conversation."""

from collections.abc import Iterable, Mapping, Sequence

from engine.blend.segments import Segments, Tokens
from engine.engine import Engine
from engine.errors import PromptError, PromptTooLong
from engine.rag.catalogue import Document
from engine.rag.documents import Source
from engine.rag.library import Library
from engine.rag.question import Around
from engine.rag.retriever import BM25
from engine.request import Completion


class Reading:
    """A prompt with chunks in it. Nothing is on record of it unless it begins."""

    def __init__(self, library: Library, segments: Segments, ids: Sequence[str | None]) -> None:
        self.segments = segments
        self._library, self._ids = library, ids

    def begin(self) -> None:
        """It may run from now on. Call `withdraw` if it never does, else `end`."""
        self._library.before_reading(self.segments.prefix)

    def withdraw(self) -> None:
        """It did not run, and has left nothing."""
        self._library.withdrawn(self.segments.prefix)

    def end(self, generated: Sequence[int], done: Completion | None) -> None:
        """Note where the prompt may have left KV; delete what was deleted meanwhile.

        Args:
            done: None for a request that was cancelled or failed, and stores nothing any more.
        """
        self._library.asked(self.segments, self._ids, generated, done)


class Shelf:
    """Documents of an engine's tenant and model; those of `Rag` are the same ones. Thread-safe.

    Args:
        engine, prefix, chunk_tokens: as for `Library`, which says what raises.
    """

    def __init__(self, engine: Engine, prefix: Tokens, chunk_tokens: int = 512) -> None:
        self._library = Library(engine, BM25(), prefix=prefix, chunk_tokens=chunk_tokens)
        self.prefix, self._engine = prefix, engine

    def read(self, sources: Source | Iterable[Source]) -> list[Document]:
        """Documents cut into chunks, on no record yet. PromptError for an empty one."""
        return self._library.read(sources)

    def add(self, documents: Sequence[Document]) -> list[Tokens]:
        """Put documents on record; the chunks whose KV is to be computed, then `stored`."""
        self._library.add(documents)
        return list(self._chunks(documents).values())

    def stored(self, documents: Sequence[Document]) -> None:
        """Their KV was computed, or some of it: delete what was deleted in the meantime."""
        self._library.stored(self._chunks(documents))

    def documents(self) -> list[Document]:
        """All documents, in the order in which they came."""
        return self._library.documents()

    def document(self, id_: str) -> Document:
        """One document. Unknown: there is none."""
        return self._library.document(id_)

    def delete(self, id_: str) -> None:
        """Forget a document, and the KV of chunks that no other has. Unknown: there is none."""
        self._library.delete([id_])

    def reading(
        self, around: Around, sources: Sequence[Source], room: int | None = None
    ) -> Reading:
        """A prompt of documents between two other parts.

        Args:
            sources: ids of documents or chunks, or {"text", "title"} of what is on no record.
            room: tokens of the whole prompt at most; None for as many as the model has positions.
        Raises:
            Unknown: an id is.
            PromptError: a text is empty, or there is nothing to read.
            PromptTooLong: there is no room for all; no more is read than there is room for.
        """
        most = self._engine.model.shape.max_positions if room is None else room
        left = most - len(around.before) - len(around.behind)
        found: list[tuple[str | None, Tokens]] = []
        for source in sources:
            for id_, tokens in self._parts(source, left, most):
                found.append((id_, tokens))
                left -= len(tokens) + len(self._library.separator)
                if left < 0:
                    raise _too_long(most)
        if not found:
            raise PromptError("documents is empty: name at least one, or leave it out")
        chunks = [tokens for _, tokens in found]
        segments = Segments(around.before, chunks, around.behind, self._library.separator)
        return Reading(self._library, segments, [id_ for id_, _ in found])

    def _parts(self, source: Source, left: int, most: int) -> Iterable[tuple[str | None, Tokens]]:
        """Chunks of a source, and their ids; PromptTooLong if they clearly are more than `left`."""
        if isinstance(source, str):
            return ((one.citation.chunk, one.tokens) for one in self._library.parts(source))
        if isinstance(source, Mapping):
            size = sum(len(text.encode(errors="surrogatepass")) for text in source.values())
            if size > max(left, 0) * self._engine.splitter.longest:
                raise _too_long(most)
        [document] = self.read([source])
        return ((None, chunk.tokens) for chunk in document.chunks)

    def _chunks(self, documents: Sequence[Document]) -> dict[str, Tokens]:
        return {chunk.id: chunk.tokens for document in documents for chunk in document.chunks}


def _too_long(room: int) -> PromptTooLong:
    return PromptTooLong(
        f"the documents and the conversation have more than {room} tokens, which is all there is "
        "room for: name fewer documents, or shorter ones"
    )
