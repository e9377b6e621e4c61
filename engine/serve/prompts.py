"""What a client sends, as the engine's prompt."""

from dataclasses import dataclass

from engine.blend.segments import Segments, ids_of
from engine.rag.documents import Source
from engine.rag.question import around_chat
from engine.rag.shelf import Reading
from engine.serve.asks import Room
from engine.serve.refusals import invalid
from engine.serve.tenants import Tenant
from engine.serve.wire import ChatRequest, CompletionRequest, InlineDocument


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt, of which nothing is on record yet.

    Args:
        reading: of a prompt with documents.
    """

    prompt: tuple[int, ...] | Segments
    reading: Reading | None = None

    @property
    def length(self) -> int:
        """Tokens of it."""
        return len(self.prompt.tokens if isinstance(self.prompt, Segments) else self.prompt)


def prompted(tenant: Tenant, request: ChatRequest | CompletionRequest, room: Room) -> Prompted:
    """The prompt of a request. For a thread of its own: long texts take long.

    Args:
        room: no more of documents is read than there is room for.
    Raises:
        PromptTooLong: documents for which there is no room.
        PromptError: the text or the conversation is not one for this model.
        Unknown: a document is.
    """
    engine = tenant.engine
    if isinstance(request, CompletionRequest):
        given = request.alone
        return Prompted(ids_of(engine.tokenize(given) if isinstance(given, str) else given))
    if not request.documents:
        return Prompted(ids_of(engine.render(request.turns)))
    if tenant.shelf is None:
        raise invalid("This model cannot reuse documents: send them as messages.", "documents")
    around = around_chat(engine, request.turns)
    most = min(room.positions, room.prompt_tokens or room.positions)
    reading = tenant.shelf.reading(around, [_source(one) for one in request.documents], most)
    return Prompted(reading.segments, reading)


def _source(document: str | InlineDocument) -> Source:
    if isinstance(document, str):
        return document
    return {"text": document.text, "title": document.title or ""}
