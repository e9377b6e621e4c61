"""What single tokens are made of: bytes, where text would need their neighbours."""

import json
import re
from collections.abc import Iterator
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte that a vocabulary has no piece for
SPACE = b" "


class TokenText:
    """The exact bytes of any token of a tokenizer; those of an answer add up to its text.

    A character may be spread over several tokens: then each has some of its bytes. Vocabularies of
    bytes (GPT-2's letters for them) and with bytes to fall back on (`<0xE4>`) say which; of others
    the text is what the tokenizer makes of the token behind another one.

    Args:
        tokenizer: a `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._letters = _letters() if _of_bytes(tokenizer) else {}
        self._neighbour = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self._known: dict[int, bytes] = {}  # as large as the vocabulary, at most

    def special(self, token: int) -> bool:
        """Whether it has no place in a text."""
        return token in self._special

    def data(self, token: int) -> bytes:
        """Its bytes; of a special token those of its name, of no token at all none."""
        if token not in self._known:
            self._known[token] = self._data(token)
        return self._known[token]

    def opening(self, token: int) -> bytes:
        """Its bytes at the start of a text, where some tokenizers drop a space."""
        data = self.data(token)
        if data.startswith(SPACE) and not self._decode([token]).startswith(" "):
            return data[1:]
        return data

    def _data(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._special:
            return str(piece).encode()
        if self._letters:
            if all(letter in self._letters for letter in piece):
                return bytes(self._letters[letter] for letter in piece)
            return str(piece).encode()  # added as it is
        if (byte := BYTE.fullmatch(piece)) and self._decode([token]) != piece:
            return bytes.fromhex(byte[1])
        return self._behind(token).encode(errors="replace")

    def _behind(self, token: int) -> str:
        """Its text behind another token, so that a space in front of it is kept."""
        before, whole = self._decode(self._neighbour), self._decode([*self._neighbour, token])
        return whole[len(before) :] if whole.startswith(before) else self._decode([token])

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def longest(tokenizer: Any) -> int | None:
    """Bytes of a text that one token can stand for, at most; None where there is no limit, as for
    vocabularies with one token for all that they do not know."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_bytes = _of_bytes(tokenizer)
    if backend is None or not (of_bytes or getattr(backend.model, "byte_fallback", False)):
        return None
    pieces, letters = tokenizer.get_vocab(), _letters().keys() if of_bytes else ()
    return max(
        len(piece) if letters and letters >= set(piece) else len(piece.encode()) for piece in pieces
    )


def _of_bytes(tokenizer: Any) -> bool:
    """Whether each letter of a token stands for a byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    return "ByteLevel" in set(_types(json.loads(backend.decoder.__getstate__())))


def _types(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _types(part)


def _letters() -> dict[str, int]:
    """The byte of each letter, as GPT-2 assigned them: those that print are themselves, all others
    are letters from 256 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + number): byte for number, byte in enumerate(hidden)
    }
