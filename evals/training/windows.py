"""Training windows: facts hidden in text, questions after it, positions with gaps."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from evals.ruler.templates import NOISE
from evals.training.corpus import Corpus, passage
from evals.training.keys import HAYSTACK_KEYS, Names
from evals.training.tasks import TASKS, Facts, Question, Statement
from evals.training.vocabulary import BOS, EOS

IGNORED, LANGUAGE, ANSWER = 0, 1, 2
SLACK = 6  # tokens that a joint between two pieces may cost


class Window(NamedTuple):
    """Tokens in a row, what is learned from each, and where they stand."""

    ids: Int[np.ndarray, " T"]
    kinds: Int[np.ndarray, " T"]
    positions: Int[np.ndarray, " T"]
    veiled: Bool[np.ndarray, " T"]
    asking: Bool[np.ndarray, " T"]


@dataclass(frozen=True, slots=True)
class Mix:
    """How windows are made.

    Args:
        tasks: weight of each of `TASKS`.
        density: share of a window that facts and questions may fill.
        intros: share of windows that begin with a task's instructions.
        questions: share of answers before which the whole question stands, not only the
            beginning of the answer.
        copies: share of windows that repeat random tokens instead.
        lines: share of windows of statements alone, one a line (RULER's needle haystack).
        noise: share of windows whose text is RULER's noise.
        alone: share of windows whose facts are all of one task, and so mistaken for each other.
        gaps: share of windows whose positions have gaps (PoSE, Zhu et al. 2023).
        reach: the largest position.
    """

    tasks: dict[str, float]
    density: float = 0.9
    intros: float = 0.3
    questions: float = 0.4
    copies: float = 0.05
    lines: float = 0.15
    noise: float = 0.1
    alone: float = 0.0
    gaps: float = 0.5
    reach: int = 32_768


@dataclass(slots=True)
class _Text:
    """A text that grows, and what its pieces are for."""

    pieces: list[str] = field(default_factory=list)
    spans: list[tuple[int, int, int, bool]] = field(default_factory=list)
    length: int = 0

    def add(self, text: str, kind: int, veiled: bool = False) -> None:
        self.pieces.append(text)
        self.spans.append((self.length, self.length + len(text), kind, veiled))
        self.length += len(text)


class Windows:
    """Makes windows of facts, questions and text.

    Args:
        corpus: `trained` is what facts are hidden in.
        tokenizer: of `build_tokenizer`.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any):
        self._corpus, self._tokenizer = corpus, tokenizer
        self._backend = tokenizer.backend_tokenizer
        one = [word for word in corpus.words if self._count([" " + word]) == 1]
        self._short = (*HAYSTACK_KEYS, *one)

    def draw(self, mix: Mix, tokens: int, rng: np.random.Generator) -> Window:
        """A window of exactly `tokens` tokens."""
        if rng.random() < mix.copies:
            return self._copies(tokens, rng)
        lines = rng.random() < mix.lines
        density = 1.0 if lines else mix.density * rng.uniform(0.05, 1)
        facts = self._facts(mix, tokens * density - 40 * mix.intros, rng)
        text, asked_from = self._compose(mix, facts, 0 if lines else tokens, rng)
        return self._encode(mix, text, asked_from, tokens, rng)

    def _facts(self, mix: Mix, room: float, rng: np.random.Generator) -> list[Facts]:
        """As many as fit `room` tokens with their questions; at least one."""
        names = Names(self._corpus.words, self._short, rng)
        kinds, weights = list(mix.tasks), np.array(list(mix.tasks.values()))
        if mix.alone and rng.random() < mix.alone:
            kinds, weights = [kinds[rng.choice(len(kinds), p=weights / weights.sum())]], np.ones(1)
        facts: list[Facts] = []
        while True:
            new = TASKS[kinds[rng.choice(len(kinds), p=weights / weights.sum())]](names, rng)
            share = mix.questions
            asked = [q.text for q in new.questions], [q.prefix + q.answer for q in new.questions]
            room -= self._count(_stated([new])) + share * self._count(asked[0])
            room -= self._count(asked[1]) + 3 * len(asked[1])
            if facts and room < 0:
                return facts
            facts.append(new)

    def _compose(
        self, mix: Mix, facts: list[Facts], tokens: int, rng: np.random.Generator
    ) -> tuple[_Text, int]:
        """The window's text, and where its questions begin; `tokens` 0: statements alone."""
        text, asked = _Text(), _Text()
        intro = facts[int(rng.integers(len(facts)))].intro
        text.add(BOS + intro if rng.random() < mix.intros else BOS, IGNORED)
        questions = [question for each in facts for question in each.questions]
        for index in rng.permutation(len(questions)):
            _ask(asked, questions[index], whole=rng.random() < mix.questions)
        fixed = self._count([*text.pieces, *asked.pieces, *_stated(facts)])
        sentences, joint = self._haystack(mix, tokens - fixed - SLACK, rng)
        slots = _slots(facts, len(sentences), rng)
        text.add("\n" if joint == " " else "", IGNORED)
        for number, sentence in enumerate([*sentences, ""]):
            for statement in slots.get(number, []):
                text.add(joint + statement.text, IGNORED, statement.veiled)
            text.add(sentence, LANGUAGE)
        asked_from = text.length
        for piece, (_, _, kind, _) in zip(asked.pieces, asked.spans, strict=True):
            text.add(piece, kind)
        return text, asked_from

    def _haystack(self, mix: Mix, tokens: int, rng: np.random.Generator) -> tuple[list[str], str]:
        """Sentences, blanks before them, of `tokens` tokens in all; what joins a fact to them."""
        if tokens < 8:
            return [], "\n"
        if rng.random() < mix.noise:
            return ["\n" + NOISE] * (tokens // self._count(["\n" + NOISE])), "\n"
        source = self._corpus.trained[int(rng.integers(len(self._corpus.trained)))]
        sentences = passage(source, rng, tokens * 8)
        if rng.random() < 0.6:
            sentences = [" " + " ".join(each.split()) for each in sentences if each.strip()]
        return self._cut(sentences, tokens), " "

    def _cut(self, sentences: list[str], tokens: int) -> list[str]:
        """The first `tokens` tokens of the sentences."""
        encoded = self._backend.encode_batch(sentences)
        counts = np.cumsum([len(each) for each in encoded])
        whole = int(np.searchsorted(counts, tokens, side="right"))
        if whole == len(sentences):
            return sentences
        left = tokens - (int(counts[whole - 1]) if whole else 0)
        last = sentences[whole][: encoded[whole].offsets[left][0]]
        return [*sentences[:whole], *([last] if last else [])]

    def _encode(
        self, mix: Mix, text: _Text, asked_from: int, tokens: int, rng: np.random.Generator
    ) -> Window:
        encoded = self._backend.encode("".join(text.pieces), add_special_tokens=False)
        starts = np.array([start for start, _ in encoded.offsets])[:tokens]
        ends = np.array([end for _, end, _, _ in text.spans])
        span = np.searchsorted(ends, starts, side="right")
        kinds = np.array([kind for _, _, kind, _ in text.spans])[span]
        veiled = np.array([veil for _, _, _, veil in text.spans])[span]
        cuts = np.flatnonzero(np.diff(span)) + 1
        pad = max(0, tokens - len(starts))
        return Window(
            np.pad(np.array(encoded.ids)[:tokens], (0, pad)),
            np.pad(kinds, (0, pad)),
            _positions(mix, cuts, tokens, rng),
            np.pad(veiled, (0, pad)),
            np.pad(starts >= asked_from, (0, pad)),
        )

    def _copies(self, tokens: int, rng: np.random.Generator) -> Window:
        """Random tokens, repeated: the second time is to be known."""
        length = int(rng.integers(8, tokens // 2))
        base = rng.integers(3, len(self._tokenizer), length)
        ids = np.tile(base, tokens // length + 1)[:tokens]
        kinds = np.where(np.arange(tokens) > length, ANSWER, IGNORED)
        none = np.zeros(tokens, bool)
        return Window(ids, kinds, np.arange(tokens), none, none)

    def _count(self, texts: list[str]) -> int:
        return sum(len(each) for each in self._backend.encode_batch(texts))


def _stated(facts: list[Facts]) -> list[str]:
    return [" " + statement.text for each in facts for statement in each.statements]


def _ask(text: _Text, question: Question, *, whole: bool) -> None:
    """Append the question, or only the beginning of its answer, and the answer."""
    text.add("\n" + question.text if whole else "\n", IGNORED)
    text.add(question.prefix, LANGUAGE)
    text.add(question.answer + question.end + EOS, ANSWER)


def _slots(
    facts: list[Facts], sentences: int, rng: np.random.Generator
) -> dict[int, list[Statement]]:
    """Before which sentence each statement stands; those of one fact in their order."""
    placed: list[tuple[float, Statement]] = []
    for each in facts:
        depths = np.sort(rng.random(len(each.statements)))
        placed += list(zip(depths, each.statements, strict=True))
    slots: dict[int, list[Statement]] = {}
    for depth, statement in sorted(placed, key=lambda pair: pair[0]):
        slots.setdefault(int(depth * (sentences + 1)), []).append(statement)
    return slots


def _positions(
    mix: Mix, cuts: Int[np.ndarray, " C"], tokens: int, rng: np.random.Generator
) -> Int[np.ndarray, " T"]:
    """0, 1, ..., with up to eight gaps where pieces meet, up to `mix.reach` in all."""
    positions = np.arange(tokens)
    free = mix.reach - tokens
    if free <= 0 or not len(cuts) or rng.random() >= mix.gaps:
        return positions
    chosen = np.sort(rng.choice(cuts, min(len(cuts), int(rng.integers(1, 9))), replace=False))
    total = int(free * rng.random())
    gaps = np.diff(np.sort(rng.integers(0, total + 1, len(chosen))), prepend=0)
    for cut, gap in zip(chosen, gaps, strict=True):
        positions[cut:] += gap
    return positions
