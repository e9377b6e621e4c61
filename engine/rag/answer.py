"""What asking documents gives: an answer, where it may be from, and what it cost."""

from dataclasses import dataclass

from engine.blend.repair import BlendReport
from engine.request import FinishReason, RequestStats


@dataclass(frozen=True, slots=True)
class Citation:
    """A chunk that an answer had before it.

    Args:
        documents: ids of all that have it.
        score: the retriever's; None where the chunk was asked for by its id.
    """

    chunk: str
    documents: tuple[str, ...]
    title: str
    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, to what, and at what cost.

    Args:
        tokens: generated ids, the end-of-text token included where there was one.
        citations: the chunks of the prompt, in the order of the request.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    citations: tuple[Citation, ...]
    stats: RequestStats

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, retrieval not included."""
        return self.stats.ttft_s

    @property
    def report(self) -> BlendReport:
        """How the chunks' KV was reused."""
        assert self.stats.blend is not None
        return self.stats.blend


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a stream: a token, the text it made certain, and on the last one the answer."""

    token: int
    text: str
    answer: Answer | None = None
