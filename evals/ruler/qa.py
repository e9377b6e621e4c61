"""Question answering among distracting documents (RULER, Hsieh et al. 2024)."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from engine.errors import ConfigError
from evals.ruler.documents import Corpus, Question
from evals.ruler.draft import Draft
from evals.ruler.templates import DOCUMENT, QA

UNIT = 100  # characters
PASSED_OVER = 20  # documents that are too long for what is left, until the prompt counts as full


@dataclass(frozen=True, slots=True)
class Qa:
    """The corpus' questions in its order. Sizes: hundreds of characters of distractors.

    RULER adds whole documents until the next one is too long; here shorter ones then get a chance.
    """

    corpus: Corpus

    @property
    def least(self) -> int:
        return 0

    @property
    def most(self) -> int | None:
        owned = max(len(x.own) for x in self.corpus.questions)
        return None if len(self.corpus.documents) > owned else 0

    def draft(self, rng: Random, index: int, size: int) -> Draft:
        question = self._question(index)
        chosen = [*question.own, *self._distractors(rng, question, size * UNIT)]
        rng.shuffle(chosen)
        texts = (self.corpus.documents[x] for x in chosen)
        documents = [DOCUMENT.format(i=i, document=text) for i, text in enumerate(texts, 1)]
        return Draft.of(QA, question.outputs, context="\n\n".join(documents), query=question.text)

    def _question(self, index: int) -> Question:
        known = len(self.corpus.questions)
        if index >= known:
            raise ConfigError(
                f"there are {known:,} questions, question {index + 1:,} was asked for: "
                "ask for fewer samples, or name a larger file"
            )
        return self.corpus.questions[index]

    def _distractors(self, rng: Random, question: Question, characters: int) -> Iterator[int]:
        passed_over = 0
        for number in self._others(rng, question):
            taken = len(self.corpus.documents[number])
            if taken <= characters:
                characters -= taken
                yield number
            elif (passed_over := passed_over + 1) == PASSED_OVER:
                return

    def _others(self, rng: Random, question: Question) -> Iterator[int]:
        """Documents that are not the question's, near ones first, without end: all, then again."""
        yield from rng.sample(question.near, len(question.near))
        used = {*question.own, *question.near}
        if len(question.own) == len(self.corpus.documents):
            return
        while True:
            if len(used) == len(self.corpus.documents):
                used = set(question.own)
            if (found := rng.randrange(len(self.corpus.documents))) not in used:
                used.add(found)
                yield found
