"""How probable the tokens of an answer were, in OpenAI's two formats."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from engine.request import Event
from engine.sampling import Likely, TokenLogprob
from engine.serve.token_text import TokenText

UTF8 = getincrementaldecoder("utf-8")
FLOOR = -9999.0  # what OpenAI says where it would be minus infinity, which JSON does not have


class Score(msgspec.Struct, frozen=True):
    """A token that might have been. `bytes` are exact where `token` is part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenScore(msgspec.Struct, frozen=True):
    """A token of the answer, and the most probable ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[Score]


class ChatScores(msgspec.Struct, frozen=True):
    """Of a chat's answer."""

    content: list[TokenScore]
    refusal: None = None


class TextScores(msgspec.Struct, frozen=True):
    """Of a completion. A token that is no whole character is `bytes:\\xe2\\x82`.

    Args:
        top_logprobs: per token; the chosen one is always among them. None where none were asked.
        text_offset: characters of the answer in front of each token.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class Placed(NamedTuple):
    """A token of the answer, its bytes, and how many characters are in front of it."""

    scored: TokenLogprob
    data: bytes
    offset: int


class Shown:
    """Finds which tokens belong to what has been shown, event by event.

    A token is held back until its text is shown, so that both come together; special tokens, and
    those that a stop string cut off, never come.
    """

    def __init__(self, words: TokenText) -> None:
        self._words = words
        self._held: list[Placed] = []
        self._first = True
        self._decoder = UTF8(errors="replace")  # of all tokens; what is no character is one, too
        self._whole = 0  # characters that it gave out
        self._end = 0  # with those of bytes that it holds back
        self._shown = 0  # characters given out

    def push(self, event: Event) -> list[Placed]:
        """Tokens whose text `event` completes."""
        if event.logprob is not None and not self._words.special(event.token):
            self._held.append(self._placed(event.logprob))
        self._shown += len(event.text)
        # nothing was cut off: what is left is of characters that were never finished
        if event.completion is not None and self._end <= self._shown:
            ready = len(self._held)
        else:
            ready = sum(placed.offset < self._shown for placed in self._held)
        out, self._held = self._held[:ready], self._held[ready:]
        return out

    def _placed(self, scored: TokenLogprob) -> Placed:
        data = (self._words.opening if self._first else self._words.data)(scored.token)
        self._first = False
        begun, _ = self._decoder.getstate()
        offset = self._whole + len(_text(begun + data[:1])) - len(data[:1])
        self._whole += len(self._decoder.decode(data))
        self._end = self._whole + len(_text(self._decoder.getstate()[0]))
        return Placed(scored, data, offset)


def chat_scores(placed: Sequence[Placed], words: TokenText) -> ChatScores:
    """As /v1/chat/completions has them."""
    return ChatScores(
        [
            TokenScore(
                _text(data),
                _finite(scored.logprob),
                list(data),
                [_score(likely, words) for likely in scored.top],
            )
            for scored, data, _ in placed
        ]
    )


def text_scores(placed: Sequence[Placed], words: TokenText) -> TextScores:
    """As /v1/completions has them."""
    asked = any(scored.top for scored, _, _ in placed)
    return TextScores(
        [_name(data) for _, data, _ in placed],
        [_finite(scored.logprob) for scored, _, _ in placed],
        [_best(one, words) for one in placed] if asked else None,
        [offset for _, _, offset in placed],
    )


def _best(placed: Placed, words: TokenText) -> dict[str, float]:
    """By name; the more probable of two with one name."""
    scored, data, _ = placed
    best = {_name(data): _finite(scored.logprob)}
    for likely in scored.top:
        best.setdefault(_name(words.data(likely.token)), _finite(likely.logprob))
    return best


def _score(likely: Likely, words: TokenText) -> Score:
    data = words.data(likely.token)
    return Score(_text(data), _finite(likely.logprob), list(data))


def _finite(logprob: float) -> float:
    return logprob if logprob > FLOOR else FLOOR  # which NaN is not either


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
