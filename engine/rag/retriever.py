"""Which chunks a question is about: by their words, or by vectors of the user's own model."""

import importlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from engine.errors import ConfigError, PromptError

K1, B = 1.2, 0.75  # how soon more of a word counts no more; how much a long chunk has to have more
# scripts written without spaces: Thai to Myanmar, Khmer, kana, ideographs, Hangul
JOINED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"


class Hit(NamedTuple):
    """A chunk found, and how well it fits: more is better, the scale is the retriever's own."""

    id: str
    score: float


@runtime_checkable
class Retriever(Protocol):
    """Finds chunks by their texts. The ids are the caller's, and stable. Calls are one at a time.

    add: chunks with their texts; known ids are not given again.
    remove: forget chunks; unknown ids are fine.
    search: the best chunks, best first; fewer than `top_k` where no more fit at all.
    """

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None: ...
    def remove(self, ids: Iterable[str]) -> None: ...
    def search(self, question: str, top_k: int) -> list[Hit]: ...


class BM25:
    """Chunks by the words they share with the question, rare words first (Okapi BM25, 1994).

    No stemming and no stop words, so it knows no language; scripts without spaces are compared by
    pairs of characters, and by single ones where a question has no more. Equal scores come in the
    order of the ids, so results depend on what is in it and not on the order in which it came.
    """

    def __init__(self) -> None:
        self._words: dict[str, Counter[str]] = {}  # of a chunk, how often
        self._lengths: dict[str, int] = {}  # of chunks, in words
        self._chunks: dict[str, dict[str, int]] = {}  # with a word, how often
        self._length = 0  # words of all chunks

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        for id_, text in zip(ids, texts, strict=True):
            if id_ in self._words:
                continue
            runs = _runs(text)
            found = _words(runs)
            self._lengths[id_] = len(found)
            self._length += len(found)
            self._words[id_] = counts = Counter(found + _characters(runs))
            for word, count in counts.items():
                self._chunks.setdefault(word, {})[id_] = count

    def remove(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            counts = self._words.pop(id_, Counter())
            self._length -= self._lengths.pop(id_, 0)
            for word in counts:
                del self._chunks[word][id_]
                if not self._chunks[word]:
                    del self._chunks[word]

    def search(self, question: str, top_k: int) -> list[Hit]:
        scores: dict[str, float] = {}
        for word, times in sorted(Counter(words(question)).items()):
            having = self._chunks.get(word, {})
            weight = times * self._rarity(len(having))
            for id_, count in having.items():
                scores[id_] = scores.get(id_, 0.0) + weight * self._saturated(id_, count)
        best = sorted(scores.items(), key=lambda hit: (-hit[1], hit[0]))
        return [Hit(*hit) for hit in best[:top_k]]

    def _rarity(self, having: int) -> float:
        """Never below zero, as a word that most chunks have does no harm (as in Lucene)."""
        return math.log1p((len(self._words) - having + 0.5) / (having + 0.5))

    def _saturated(self, id_: str, count: int) -> float:
        length = self._lengths[id_] * len(self._words) / self._length
        return count * (K1 + 1) / (count + K1 * (1 - B + B * length))


class Vectors:
    """Chunks by the cosine of vectors, exactly, with FAISS.

    Args:
        embed: texts to one vector each, a float array [n, d]; called with at most `batch` texts.
    Raises:
        ConfigError: FAISS is not installed, or a batch of less than one text.
    """

    def __init__(self, embed: Callable[[list[str]], Any], *, batch: int = 64) -> None:
        try:
            self._faiss: Any = importlib.import_module("faiss")
        except ImportError as error:
            raise ConfigError(
                "search by vectors needs FAISS: pip install 'headrace[cpu]'"
            ) from error
        if batch < 1:
            raise ConfigError(f"batch is a number of texts, at least 1, got {batch}")
        self._embed, self._batch = embed, batch
        self._index: Any = None  # made when the first vector says how long they are
        self._ids: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._count = 0  # of all chunks ever added: a number is not used again

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        given = dict(zip(ids, texts, strict=True))
        new = [id_ for id_ in given if id_ not in self._numbers]
        for start in range(0, len(new), self._batch):
            part = new[start : start + self._batch]
            self._insert(part, self._vectors([given[id_] for id_ in part]))

    def remove(self, ids: Iterable[str]) -> None:
        numbers = [self._numbers.pop(id_) for id_ in ids if id_ in self._numbers]
        for number in numbers:
            del self._ids[number]
        if numbers:
            self._index.remove_ids(np.asarray(numbers, np.int64))

    def search(self, question: str, top_k: int) -> list[Hit]:
        if not self._ids:
            return []
        found = self._index.search(self._vectors([question]), min(top_k, len(self._ids)))
        hits = zip(found[1][0].tolist(), found[0][0].tolist(), strict=True)
        named = [Hit(self._ids[number], score) for number, score in hits]
        return sorted(named, key=lambda hit: (-hit.score, hit.id))

    def _insert(self, ids: Sequence[str], vectors: Float32[np.ndarray, "n d"]) -> None:
        numbers = range(self._count, self._count + len(ids))
        self._count += len(ids)
        self._index.add_with_ids(vectors, np.asarray(numbers, np.int64))
        self._ids |= dict(zip(numbers, ids, strict=True))
        self._numbers |= dict(zip(ids, numbers, strict=True))

    def _vectors(self, texts: list[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of length 1. PromptError for anything but one finite vector a text."""
        needed = f"embed must return {len(texts)} finite vectors as an array [n, d]"
        made = self._embed(texts)
        try:
            vectors = np.asarray(made, np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # torch's are RuntimeErrors
            raise PromptError(f"{needed}: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise PromptError(f"{needed}, got {'x'.join(map(str, vectors.shape)) or 'one value'}")
        if self._index is None:
            self._index = self._faiss.IndexIDMap(self._faiss.IndexFlatIP(vectors.shape[1]))
        if vectors.shape[1] != self._index.d:
            raise PromptError(f"embed returned vectors of {vectors.shape[1]} after {self._index.d}")
        tiny = np.finfo(np.float64).tiny
        vectors = vectors / np.abs(vectors).max(1, initial=tiny, keepdims=True)  # squares have room
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), tiny)
        return np.ascontiguousarray(unit, np.float32)


def words(text: str) -> list[str]:
    """What of a text is compared: words without case and form, joined scripts in pairs."""
    return _words(_runs(text))


def _words(runs: list[tuple[str, str]]) -> list[str]:
    found: list[str] = []
    for joined, word in runs:
        pairs = [joined[i : i + 2] for i in range(len(joined) - 1)]
        found += pairs or [joined or word]
    return found


def _characters(runs: list[tuple[str, str]]) -> list[str]:
    """Of joined scripts, those that are words in pairs only."""
    return [one for joined, _ in runs if len(joined) > 1 for one in joined]


def _runs(text: str) -> list[tuple[str, str]]:
    """Pieces without case and form: a run of a joined script, or a word."""
    text = unicodedata.normalize("NFKC", text.casefold())
    return _pattern(text).findall(text)


def _pattern(text: str) -> re.Pattern[str]:
    """Of runs of a joined script, and of words: letters and digits with the marks on them."""
    marks = "".join(sorted(c for c in set(text) if unicodedata.category(c)[0] == "M"))
    letter = rf"(?![{JOINED}])(?:[^\W_]|[{marks}])" if marks else rf"(?![{JOINED}])[^\W_]"
    return re.compile(rf"([{JOINED}]+)|((?:{letter})+)")
