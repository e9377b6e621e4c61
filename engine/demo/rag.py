"""The RAG trip end to end: read documents, stop, and answer in another order in a new process."""

import msgspec

from engine.demo import demo
from engine.demo.demo import DemoError


class Job(demo.Job, frozen=True, kw_only=True):
    """Of prompts of all documents: `add` these first, then ask for each fact."""

    add: bool


class Answer(msgspec.Struct, frozen=True):
    """One question, and what came; `full_s` is the time to the first token without any reuse."""

    key: str
    value: str
    text: str
    right: bool
    order: list[str]  # titles of the documents as they were read
    ttft_s: float
    full_s: float
    prompt_tokens: int
    exact_tokens: int
    reused_tokens: int
    fresh_tokens: int
    charged: float
    missed: int
    reason: str


class Outcome(msgspec.Struct, frozen=True):
    """What one process found."""

    documents: int
    chunks: int
    add_s: float
    answers: list[Answer]
    disk_reads: int
    disk_bytes: int

    @property
    def correct(self) -> int:
        return sum(answer.right for answer in self.answers)


def check(first: Outcome, second: Outcome) -> None:
    """DemoError unless the second process took every chunk from disk, in another order."""
    missed = sum(answer.missed for answer in second.answers)
    if missed or not second.disk_reads:
        raise DemoError(
            f"the new process missed {missed} chunks and read {second.disk_reads} times from disk: "
            "that was no reuse"
        )
    if any(a.order == b.order for a, b in zip(first.answers, second.answers, strict=True)):
        raise DemoError("both processes read the documents in the same order")
