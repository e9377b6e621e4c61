"""Retrieval-augmented generation: documents are read once, and answer questions in any order."""

import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, get_args

import msgspec

from engine.blend.repair import BlendConfig, PolicyName
from engine.blend.segments import Segments
from engine.engine import Engine
from engine.errors import ConfigError, EngineError, PromptError, PromptTooLong
from engine.rag.answer import Answer, Step
from engine.rag.background import in_thread
from engine.rag.catalogue import Document
from engine.rag.documents import Source
from engine.rag.library import Cited, Library
from engine.rag.question import around
from engine.rag.retriever import BM25, Hit, Retriever
from engine.request import Completion, Event
from kvstore.errors import StoreError

log = logging.getLogger(__name__)
TOP_K = 5


class Rag:
    """Documents that an engine has read, and answers from them.

    The KV of every chunk is computed once, by `add`, and reused in any prompt and place; the
    engine's `blend` settings say how that is repaired. Documents, their chunks and their KV stay
    for the next process if the engine has a disk tier. They belong to the engine's tenant and
    model; others never see them. May be used from several threads, by several processes.

    Args:
        engine: with a tokenizer; close it yourself, when all is done.
        chunk_tokens: of a chunk at most, its document's title included.
        policy, share: which reused tokens are computed afresh, and how many; None takes the
            engine's `blend`. See `engine.blend.repair`.
        retriever: finds the chunks for a question; `BM25` if None, `Vectors` with an embedding.
            It is filled here, and must be of no other use.
        prefix: instructions in front of all chunks. KV belongs to them: others, other KV.
        path: folder of the catalogue, which holds the documents' text; None is the engine's disk
            tier's, and without that keeps it in memory.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: the model's KV cannot be moved.
        CatalogueError: the catalogue is damaged or cannot be read.
    """

    def __init__(
        self,
        engine: Engine,
        chunk_tokens: int = 512,
        *,
        policy: str | None = None,
        share: float | None = None,
        retriever: Retriever | None = None,
        prefix: str = "",
        path: str | Path | None = None,
    ) -> None:
        if engine.tokenizer is None:
            raise ConfigError("Rag needs an engine with a tokenizer")
        self.engine = engine
        self._blend = _blend(engine.config.blend, policy, share)
        self._instructions = prefix
        self.prefix = around(engine, prefix, "?").before  # token ids
        self._library = Library(
            engine, retriever or BM25(), prefix=self.prefix, chunk_tokens=chunk_tokens, folder=path
        )

    def add(
        self,
        documents: Source | Iterable[Source],
        *,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> list[str]:
        """Read documents: texts, files, or {"text", "id", "title"}; the ids of their chunks.

        What is known already is not computed again; a document with a known id takes the place of
        the old one. When it returns, all is where the engine keeps it.

        Args:
            progress: called with chunks done and of how many.
        Raises:
            PromptError: a document is empty or cannot be read; nothing was added.
            StoreError: the store failed. The documents are known, adding them again completes it.
        """
        new = self._library.read(documents)
        chunks = {chunk.id: chunk.tokens for document in new for chunk in document.chunks}
        self._library.add(new)
        self.engine.precompute(list(chunks.values()), self.prefix, progress)
        self.engine.store.flush()
        self._library.stored(chunks)
        return list(chunks)

    def documents(self) -> list[Document]:
        """All documents, in the order in which they came."""
        return self._library.documents()

    def delete(self, ids: str | Iterable[str]) -> int:
        """Forget documents: their text, and the KV of chunks that no other document has.

        Returns how many chunks that were. What a running request still stores of them goes when
        it ends; what other processes hold in memory goes when they end. Two things stay until they
        are evicted, or their time on the server is over: what a process that was killed had stored
        of a prompt that it read whole, or of chunks that were deleted meanwhile; and what is on a
        shared server and no longer here.

        Raises:
            PromptError: there is no such document; nothing was deleted.
        """
        return self._library.delete([ids] if isinstance(ids, str) else list(ids))

    def search(self, question: str, top_k: int = TOP_K) -> list[Hit]:
        """The ids of the chunks that the retriever finds, best first."""
        return self._library.search(question, top_k)

    def ask(
        self, question: str, chunks: str | Sequence[str] | None = None, **options: Any
    ) -> Answer:
        """The answer to a question. As `stream`, which lists the options."""
        with closing(self.stream(question, chunks, **options)) as steps:
            [answer] = [step.answer for step in steps if step.answer is not None]
            return answer

    def stream(
        self,
        question: str,
        chunks: str | Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generator[Step]:
        """Token by token; the last step has the answer. Closing it cancels the request.

        Args:
            chunks: ids, in the order in which the model reads them, or one; instead of a search.
            top_k: how many chunks the retriever chooses; 5 if nothing is said.
        Raises:
            PromptError: no such chunk, none that fits the question, or no room for all of it.
        """
        if chunks is not None and top_k is not None:
            raise PromptError("give chunks, or top_k for a search, not both")
        behind = self._behind(question)
        if chunks is not None:
            cited = self._library.named(chunks)
        else:
            cited = self._library.find(question, TOP_K if top_k is None else top_k)
        segments = self._segments(cited, behind)
        events = self.engine.stream(
            segments,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            blend=self._blend,
        )
        return self._steps(segments, cited, events)

    def prompt(self, question: str, chunks: str | Sequence[str]) -> Segments:
        """What the engine is given for a question and chunks by their ids."""
        behind = self._behind(question)
        return self._segments(self._library.named(chunks), behind)

    async def aask(
        self, question: str, chunks: str | Sequence[str] | None = None, **options: Any
    ) -> Answer:
        """As `ask`, while the event loop goes on. Cancelling it frees the request."""
        async with aclosing(self.astream(question, chunks, **options)) as steps:
            [answer] = [step.answer async for step in steps if step.answer is not None]
            return answer

    def astream(
        self, question: str, chunks: str | Sequence[str] | None = None, **options: Any
    ) -> AsyncGenerator[Step]:
        """As `stream`, from a thread of its own. Leaving it frees the request."""
        return in_thread(lambda: self.stream(question, chunks, **options))

    def _behind(self, question: str) -> tuple[int, ...]:
        """The question's tokens. PromptError where it alone is too much, or nothing."""
        before, behind = around(self.engine, self._instructions, question)
        anew = around(self.engine, self._instructions, "?").before  # a template may say the date
        if before not in (self.prefix, anew):
            raise PromptError("the chat template puts the question in front of the texts")
        positions = self.engine.model.shape.max_positions
        if len(before) + len(behind) > positions:
            raise PromptTooLong(
                f"the question has {len(behind)} tokens and stands behind {len(before)} of "
                f"instructions, the model has {positions} positions: shorten the question"
            )
        return behind

    def _segments(self, cited: Sequence[Cited], behind: tuple[int, ...]) -> Segments:
        """The whole prompt. PromptError if the model has no room for it."""
        chunks, positions = [one.tokens for one in cited], self.engine.model.shape.max_positions
        segments = Segments(self.prefix, chunks, behind, self._library.separator)
        if len(segments.tokens) > positions:
            raise PromptTooLong(
                f"{len(cited)} chunks and the question have {len(segments.tokens)} tokens, the "
                f"model {positions} positions: ask with fewer chunks, or add with less chunk_tokens"
            )
        return segments

    def _steps(
        self, segments: Segments, cited: Sequence[Cited], events: Generator[Event]
    ) -> Generator[Step]:
        generated: list[int] = []
        done: Completion | None = None
        self._library.before_reading()
        try:
            for event in events:
                generated.append(event.token)
                done = event.completion
                yield Step(event.token, event.text, None if done is None else _answer(done, cited))
        finally:
            events.close()
            try:
                chunks = [one.citation.chunk for one in cited]
                self._library.asked(segments, chunks, generated, done)
            except (EngineError, StoreError):  # who has an answer by now, keeps it
                log.exception("what was deleted meanwhile is deleted with the next question")


def _answer(done: Completion, cited: Sequence[Cited]) -> Answer:
    citations = tuple(one.citation for one in cited)
    return Answer(done.text or "", done.tokens, done.finish_reason, citations, done.stats)


def _blend(config: BlendConfig, policy: str | None, share: float | None) -> BlendConfig:
    """The engine's settings with ours. What was repaired is not kept, so deletion is complete."""
    if policy is not None and policy not in get_args(PolicyName):
        names = ", ".join(get_args(PolicyName))
        raise ConfigError(f"policy must be one of {names}, got {policy!r}")
    changes: dict[str, Any] = {"policy": policy, "share": share, "keep_repaired": False}
    given = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(config, **given)
