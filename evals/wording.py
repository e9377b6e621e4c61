"""How needles are stated and asked for, in the words of several benchmarks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from engine.demo.haystack import KEYS, count_tokens
from engine.errors import ConfigError
from evals.ruler.templates import NEEDLE, NIAH, Template, singular
from evals.task import Turn

ADJECTIVES = (
    "quiet", "golden", "broken", "distant", "gentle", "hollow", "clever", "frozen", "narrow",
    "ancient", "bright", "humble", "crimson", "eager", "wooden", "silent",
)  # fmt: skip
SPARE = 16  # tokens of an answer beside those of its values


class Fact(NamedTuple):
    """What a needle says."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Wording:
    """One way to say it.

    Args:
        one, many: how one value of a key, and several, are asked for; `query` is the key.
        statement: of one value of a key.
        adjectives: that keys have, before a noun of `engine.demo.haystack.KEYS`; none if empty.
        values: numbers from the first to the last.
        between: an answer and the next question of a conversation.
        chat: see `evals.task.Sample`; False for a text that goes on as it began.
    """

    one: Template
    many: Template
    statement: str
    adjectives: Sequence[str]
    values: range
    between: str
    chat: bool
    stop: tuple[str, ...]

    def facts(self, rng: Random, keys: int, values: int = 1) -> list[Fact]:
        """Different keys with so many values each; all values differ, and have as many digits."""
        nouns = rng.sample(KEYS.split(), keys)
        named = [f"{rng.choice(self.adjectives)}-{x}" if self.adjectives else x for x in nouns]
        width = len(str(self.values[-1]))
        numbers = iter(rng.sample(self.values, keys * values))
        return [Fact(key, f"{next(numbers):0{width}}") for key in named for _ in range(values)]

    def state(self, fact: Fact) -> str:
        """The needle."""
        return self.statement.format(key=fact.key, value=fact.value)

    def ask(self, tokenizer: Any, facts: Sequence[Fact], before: str = "") -> Turn:
        """The question for all values of the facts' key, after a text `before` it."""
        template = self.one if len(facts) == 1 else self.many
        values = tuple(fact.value for fact in facts)
        return Turn(
            question=before + template.question.format(query=facts[0].key),
            prefix=template.prefix.format(query=facts[0].key),
            outputs=values,
            max_new_tokens=count_tokens(tokenizer, f" {', '.join(values)}.") + SPARE,
            stop=self.stop,
        )

    def answered(self, turn: Turn) -> str:
        """A turn with its reference as the answer, as the beginning of what is asked next."""
        return f"{turn.question}{turn.prefix} {', '.join(turn.outputs)}.{self.between}"


def _ruler(template: Template, numbers: str) -> Template:
    return Template(*(part.replace("{type_needle_v}", numbers) for part in template))


WORDINGS = {
    # what models/needle-tiny knows, as the end of `headrace ask` makes it
    "plain": Wording(
        one=Template(
            "{context}",
            " What is the special magic number for {query}?",
            " The special magic number for {query} is",
        ),
        many=Template(
            "{context}",
            " What are all the special magic numbers for {query}?",
            " The special magic numbers for {query} are",
        ),
        statement="The special magic number for {key} is {value}.",
        adjectives=(),
        values=range(10**6),
        between="",
        chat=False,
        stop=(".",),
    ),
    "ruler": Wording(
        one=_ruler(singular(NIAH), "number"),
        many=_ruler(NIAH, "numbers"),
        statement=NEEDLE.replace("{type_needle_v}", "numbers"),
        adjectives=ADJECTIVES,
        values=range(10**6, 10**7),
        between="\n",
        chat=True,
        stop=(),
    ),
}


def worded(tasks: Sequence[str]) -> list[str]:
    """Names of tasks in each wording."""
    return [f"{task}-{wording}" for task in tasks for wording in WORDINGS]


def parted(suite: str, tasks: Sequence[str], name: str) -> tuple[str, Wording]:
    """A task and its wording, of a name of `worded`; ConfigError for any other."""
    if name not in worded(tasks):
        raise ConfigError(f"{suite} has no task {name}; it has {', '.join(worded(tasks))}")
    task, _, wording = name.rpartition("-")
    return task, WORDINGS[wording]


def share_found(prediction: str, outputs: Sequence[str]) -> float:
    """0..100: how many of the values stand in a prediction, as whole numbers.

    Raises:
        ConfigError: there are no values.
    """
    if not outputs:
        raise ConfigError("there are no outputs to compare the prediction with")
    said = set(re.findall(r"\d+", prediction))
    return 100.0 * sum(value in said for value in outputs) / len(outputs)
