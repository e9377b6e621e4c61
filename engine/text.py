"""Text as it becomes certain: tokens in, whole characters out, up to a stop string."""

from collections.abc import Sequence
from typing import Any

LONGEST = 4  # tokens of one character: it has so many bytes at most


class TextStream:
    """Decodes a growing token list into text that will not be taken back.

    Held back: bytes of an unfinished character, and the start of what may become a stop string.

    Args:
        tokenizer: a `transformers` tokenizer.
        stop: strings that end the text; what is returned ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._special = frozenset(tokenizer.all_special_ids)
        self._tokens: list[int] = []
        # [context, done) was decoded before and gives the next tokens their left neighbours
        self._context = self._done = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Text that `token` makes certain; empty once stopped."""
        if token in self._special:
            return ""  # and no left neighbour: some decoders drop the blank behind a beginning
        self._tokens.append(token)
        before, done = self._decode(self._context, self._done), len(self._tokens)
        after = self._decode(self._context, done)
        if after.endswith("\ufffd"):  # in the middle of a character
            if done - self._done < 2 * LONGEST:
                return ""
            done = self._border(after)
            after = self._decode(self._context, done)
        more = self._more(before, after, done)
        self._context, self._done = self._done, done
        return self._release(more)

    def finish(self) -> str:
        """Everything still held back: no more tokens come."""
        if self.stopped:
            return ""
        before, done = self._decode(self._context, self._done), len(self._tokens)
        rest = self._release(self._more(before, self._decode(self._context, done), done))
        held, self._held = self._held, ""
        return rest + ("" if self.stopped else held)

    def _more(self, before: str, after: str, done: int) -> str:
        """What is new: behind bytes that were given up it has no neighbours, as they may be read
        in another way by now, of another length."""
        if before.endswith("\ufffd") and not after.startswith(before):
            return self._decode(self._done, done)
        return after[len(before) :]

    def _border(self, text: str) -> int:
        """Where what is held back may be cut: its last tokens may yet become a character."""
        stop = len(self._tokens)
        for at in range(stop - LONGEST + 1, self._done, -1):
            if self._decode(self._context, at) + self._decode(at, stop) == text:
                return at
        return stop

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
