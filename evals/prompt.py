"""A sample's texts as tokens: a context that all its turns share, and what each asks of it."""

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from engine.errors import PromptError
from evals.task import Sample, Turn


@dataclass(frozen=True, slots=True)
class Asked:
    """A turn as tokens: `question` follows `context`. PromptError where one is empty."""

    context: tuple[int, ...]
    question: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (self.context and self.question):
            raise PromptError("a prompt needs two tokens: one to be read, one to be asked")

    @property
    def tokens(self) -> int:
        """Of the whole prompt."""
        return len(self.context) + len(self.question)

    @property
    def sha256(self) -> str:
        """Of its token ids as little-endian int32."""
        ids = array("i", (*self.context, *self.question))
        if sys.byteorder == "big":
            ids.byteswap()
        return hashlib.sha256(ids.tobytes()).hexdigest()


def ask(tokenizer: Any, sample: Sample) -> list[Asked]:
    """Every turn of a sample; the contexts are the same one.

    What the turns share with each other and with the context alone is the context: where it ends,
    a template may add its own end of a message.

    Raises:
        PromptError: no question, or the chat template does not put it behind the text.
    """
    wholes = [_whole(tokenizer, sample.context, turn, sample.chat) for turn in sample.turns]
    alone = _whole(tokenizer, sample.context, Turn("", "", (), 1), sample.chat)
    shared = min(_common(alone, whole) for whole in wholes)
    shared = max(0, min(shared, *(len(whole) - 1 for whole in wholes)))
    if 2 * shared < len(alone):
        raise PromptError(
            f"{sample.id}: the chat template does not put the question behind the text"
        )
    return [Asked(tuple(whole[:shared]), tuple(whole[shared:])) for whole in wholes]


def ask_alone(tokenizer: Any, sample: Sample, turn: int) -> Asked:
    """A turn without the sample's context: what is left to be read is the question."""
    whole = _whole(tokenizer, "", sample.turns[turn], sample.chat)
    return Asked(tuple(whole[:-1]), tuple(whole[-1:]))


def prompt_tokens(tokenizer: Any, sample: Sample, turn: int = 0) -> int:
    """Tokens of a turn's prompt, those of the chat template and special ones included."""
    return len(_whole(tokenizer, sample.context, sample.turns[turn], sample.chat))


def _whole(tokenizer: Any, context: str, turn: Turn, chat: bool) -> list[int]:
    """Context, question and the answer's prefix, which stands behind the template's last word."""
    text = context + turn.question
    if not (chat and tokenizer.chat_template):
        return list(tokenizer(text + turn.prefix, verbose=False)["input_ids"])
    try:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # it is code, of whoever made the model
        raise PromptError(f"the chat template refuses a question: {error}") from error
    bare = tokenizer(said + turn.prefix, add_special_tokens=False, verbose=False)
    return list(bare["input_ids"])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two prompts begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
