"""Retrieval-augmented questions: facts in chunks of text that a store keeps one by one.

What blending must repair is what a chunk says only in another one's light. A two-hop fact is of
that kind: `Y is 123456.` in one chunk, `X is the same as Y.` in a later one, which a model resolves
where the second sentence stands, and cannot where it reads that chunk alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from random import Random
from typing import Any, NamedTuple

from engine.blend.segments import Segments
from engine.demo.haystack import KEYS, count_tokens
from engine.errors import ConfigError
from evals.fitted import Unfit, fitted
from evals.metrics.longbench import longbench_score
from evals.musique import Question, musique
from evals.rows import Source, default_source, read_rows
from evals.ruler.essay import essay_of
from evals.ruler.templates import QA, Template
from evals.stretch import LEAST, Needle, stretch
from evals.task import Sample, Turn
from evals.wording import SPARE, WORDINGS, share_found

CHUNKS = 10
FACTS = 5  # of single-hop samples
PAIRS = 3  # of two-hop samples; each takes two chunks
HOPS = Template("\n{context}", "\nWhat is {query}?", " {query} is")
WORDS = 32  # tokens of an answer in words
FILL = 0.5  # of the length, at the least: so that no prompt is asked under a length and its double

Texts = Callable[[int], Sequence[str]]  # the chunks of a size


class Draft(NamedTuple):
    """Chunks of any size from `least` up to `most`, what surrounds them, and what is asked."""

    before: str
    texts: Texts
    least: int
    most: int | None
    turn: Turn
    family: str
    chat: bool = False


class RagSuite:
    """Questions about chunks; `extra["chunks"]` are their ends, in characters of the context.

    single-plain, single-ruler: one of five facts in chunks of their own, in both wordings.
    two-hop: one of three facts that two chunks state between them, the referring one later.
    musique: questions of several hops about real paragraphs, and others, as many as have room;
        left out are questions whose paragraphs fill less than half of the length, or do not fit.

    Args:
        haystack: the text of made chunks; by default the reference pages of the Python language.
        musique: see `evals.rows.read_rows`; by default `$HEADRACE_DATA/musique`.
    """

    tasks = ("single-plain", "single-ruler", "two-hop", "musique")

    def __init__(
        self, seed: int = 42, haystack: str | None = None, musique: Source | None = None
    ) -> None:
        self.seed = seed
        self._essay, self._source = essay_of(haystack), musique

    def samples(self, tokenizer: Any, task: str, length: int, count: int) -> Iterator[Sample]:
        """As `evals.task.Suite` has it.

        Raises:
            ConfigError: no such task, too short or long a length, or the paragraphs are missing.
        """
        if task not in self.tasks:
            raise ConfigError(f"rag has no task {task}; it has {', '.join(self.tasks)}")
        if task == "musique":
            yield from self._asked(tokenizer, length, count)
            return
        size = None
        for index in range(count):
            draft = self._draft(tokenizer, task, Random(f"{self.seed} {task} {index}"))
            make = partial(_sample, draft, task, length, index)
            sample, size = fitted(tokenizer, make, draft.least, guess=size)
            yield sample

    def _asked(self, tokenizer: Any, length: int, count: int) -> Iterator[Sample]:
        """The first questions that go with a length; a sample's number is its question's."""
        made, size, unfit = 0, None, None
        for index, question in enumerate(self._questions):
            if made == count:
                return
            draft = _read(question)
            make = partial(_sample, draft, "musique", length, index)
            try:
                sample, size = fitted(tokenizer, make, draft.least, draft.most, size, FILL)
            except Unfit as error:
                unfit = unfit or error
                continue
            made += 1
            yield sample
        if made < count:
            first = f" (the first that does not: {unfit})" if unfit else ""
            raise ConfigError(
                f"{made:,} of {len(self._questions):,} questions go with {length:,} tokens, "
                f"{count:,} were asked for: ask for fewer samples, or name a larger file{first}"
            ) from unfit

    def score(self, sample: Sample, turn: int, prediction: str) -> float:
        """0..100: whether the number was said; of an answer in words, its F1."""
        outputs = sample.turns[turn].outputs
        if sample.task == "musique":
            return 100 * longbench_score("musique", prediction, outputs)
        return share_found(prediction, outputs)

    @cached_property
    def _questions(self) -> list[Question]:
        return musique(read_rows(self._source or default_source("musique", "--musique")))

    def _draft(self, tokenizer: Any, task: str, rng: Random) -> Draft:
        if task == "two-hop":
            return self._two_hop(tokenizer, rng)
        return self._single(tokenizer, rng, task.rpartition("-")[2])

    def _single(self, tokenizer: Any, rng: Random, wording: str) -> Draft:
        words = WORDINGS[wording]
        facts = words.facts(rng, FACTS)
        chosen = rng.sample(range(CHUNKS), FACTS)
        hidden = {at: words.state(fact) for at, fact in zip(chosen, facts, strict=True)}
        turn = words.ask(tokenizer, facts[:1])
        return self._planted(rng, words.one, hidden, turn, "single needle", chat=words.chat)

    def _two_hop(self, tokenizer: Any, rng: Random) -> Draft:
        keys, chosen = rng.sample(KEYS.split(), 2 * PAIRS), rng.sample(range(CHUNKS), 2 * PAIRS)
        values = [str(x) for x in rng.sample(range(10**5, 10**6), PAIRS)]
        hidden: dict[int, str] = {}
        for pair, value in enumerate(values):
            first, second = sorted(chosen[2 * pair : 2 * pair + 2])
            known, asked = keys[2 * pair : 2 * pair + 2]
            hidden |= {first: f"{known} is {value}.", second: f"{asked} is the same as {known}."}
        new = count_tokens(tokenizer, f" {values[0]}.") + SPARE
        turn = _turn(HOPS, keys[1], values[:1], new, ".")
        return self._planted(rng, HOPS, hidden, turn, "two hops")

    def _planted(
        self,
        rng: Random,
        template: Template,
        hidden: dict[int, str],
        turn: Turn,
        family: str,
        *,
        chat: bool = False,
    ) -> Draft:
        """Chunks of running text, each from a sentence of its own on, some with a statement."""
        before, after = template.context.split("{context}")
        needles = [[Needle(rng.random(), hidden[i])] if i in hidden else [] for i in range(CHUNKS)]
        made = [stretch(self._essay, rng, needle) for needle in needles]
        turn = replace(turn, question=after + turn.question)

        def texts(words: int) -> list[str]:
            return [f" {text(words)}" for text in made]

        return Draft(before, texts, LEAST, None, turn, family, chat)


def _read(asked: Question) -> Draft:
    turn = _turn(QA, asked.text, asked.answers, WORDS, "\n")
    before = QA.context.split("{context}")[0]
    least, most = len(asked.needed), len(asked.paragraphs)
    return Draft(before, asked.some, least, most, turn, "QA", chat=True)


def _turn(template: Template, query: str, outputs: Sequence[str], new: int, stop: str) -> Turn:
    question, prefix = (part.format(query=query) for part in template[1:])
    return Turn(question, prefix, tuple(outputs), new, (stop,))


def _sample(draft: Draft, task: str, length: int, index: int, size: int) -> Sample:
    pieces = (draft.before, *draft.texts(size))
    return Sample(
        id=f"rag/{task}/{length}/{index}",
        suite="rag",
        task=task,
        family=draft.family,
        length=length,
        context="".join(pieces),
        turns=(draft.turn,),
        chat=draft.chat,
        extra={"chunks": list(accumulate(map(len, pieces)))},
    )


def segments(tokenizer: Any, sample: Sample) -> Segments:
    """A sample as a store takes it: each piece is tokens by itself, whatever comes before.

    The first begins with the tokenizer's first token; the last ends where the answer's own text
    begins, a blank that is a token of its own being part of the question.
    """
    ends = sample.extra["chunks"]
    turn = sample.turns[0]
    asked = f"{turn.question}{turn.prefix} "
    first = tokenizer.bos_token_id
    prefix = _tokens(tokenizer, sample.context[: ends[0]])
    return Segments(
        prefix=prefix if first is None else (first, *prefix),
        chunks=tuple(_tokens(tokenizer, sample.context[a:b]) for a, b in pairwise(ends)),
        question=_tokens(tokenizer, asked + turn.outputs[0], len(asked)),
    )


def _tokens(tokenizer: Any, text: str, stop: int | None = None) -> tuple[int, ...]:
    """Of a text, up to the one that goes beyond `stop` characters."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return tuple(token for token, (_, end) in pairs if stop is None or end <= stop)
