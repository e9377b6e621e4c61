"""What the model learns to do: facts to hide, and questions in RULER's form about them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from evals.ruler.draft import insert
from evals.ruler.templates import NEEDLE, NIAH, NOISE, TRACING, Template, singular
from evals.training.keys import Names


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence to hide. `veiled`: questions must do without it, by what was made of it."""

    text: str
    veiled: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the beginning of its answer, and the answer."""

    text: str
    prefix: str
    answer: str
    end: str = "."


@dataclass(frozen=True, slots=True)
class Facts:
    """Statements, to be hidden in this order, and questions about them in any order."""

    intro: str
    statements: list[Statement]
    questions: list[Question]


Task = Callable[[Names, np.random.Generator], Facts]


def _needles(kind: str, pairs: list[tuple[str, str]]) -> list[Statement]:
    return [
        Statement(NEEDLE.format(type_needle_v=kind, key=key, value=value)) for key, value in pairs
    ]


def _facts(
    template: Template, statements: list[Statement], answer: str, end: str, **about: object
) -> Facts:
    """One question in RULER's wording."""
    context, question, prefix = (part.format(context="", **about) for part in template)
    return Facts(context.strip(), statements, [Question(question, prefix, answer, end)])


def single(names: Names, rng: np.random.Generator) -> Facts:
    """A key and a value of seven digits (RULER's niah_single and niah_multikey)."""
    return _single("numbers", names.pair(), names.number(7))


def single_uuid(names: Names, rng: np.random.Generator) -> Facts:
    """A uuid as the value, sometimes as the key too (niah_single_3, niah_multikey_3)."""
    return _single("uuids", names.uuid() if rng.random() < 0.5 else names.pair(), names.uuid())


def _single(kind: str, key: str, value: str) -> Facts:
    about = {"type_needle_v": kind.removesuffix("s"), "query": key}
    return _facts(singular(NIAH), _needles(kind, [(key, value)]), f" {value}", ".", **about)


def multi_value(names: Names, rng: np.random.Generator) -> Facts:
    """A key with two to four values, mostly four, answered in the order of the text."""
    return _values(names, rng, said=0)


def other_values(names: Names, rng: np.random.Generator) -> Facts:
    """The values of a key that were not said yet, in their order; the others in any order."""
    return _values(names, rng, said=int(rng.integers(1, 4)))


def _values(names: Names, rng: np.random.Generator, *, said: int) -> Facts:
    """RULER's niah_multivalue, after an answer that began with `said` of the values or fewer."""
    key, values = names.pair(), [names.number(7) for _ in range(rng.choice((2, 3, 4, 4, 4)))]
    needles = _needles("numbers", [(key, value) for value in values])
    before = rng.permutation(values)[: min(said, len(values) - 1)].tolist()
    left = [value for value in values if value not in before]
    about = {"type_needle_v": "numbers", "query": key}
    facts = _facts(NIAH, needles, " " + ", ".join(left), ".", **about)
    asked = facts.questions[0]
    begun = "".join(f" {value}," for value in before)
    return replace(facts, questions=[replace(asked, prefix=asked.prefix + begun)])


def multi_query(names: Names, rng: np.random.Generator) -> Facts:
    """Two to four keys in one question, each answered with its value (niah_multiquery)."""
    pairs = [(names.pair(), names.number(7)) for _ in range(rng.integers(2, 5))]
    asked = [pairs[i] for i in rng.permutation(len(pairs))]
    keys = [key for key, _ in asked]
    answer = "".join(f" {key}: {value}," for key, value in asked)[:-1]
    about = {"type_needle_v": "numbers", "query": ", ".join(keys[:-1]) + ", and " + keys[-1]}
    return _facts(NIAH, _needles("numbers", pairs), answer, ".", **about)


def plain(names: Names, rng: np.random.Generator) -> Facts:
    """The wording of `engine.demo.haystack`: six digits."""
    key, value = names.single(), names.number(6)
    about = f"special magic number for {key}"
    question = Question(f"What is the {about}?", f" The {about} is", f" {value}")
    return Facts("", [Statement(f"The {about} is {value}.")], [question])


def two_hops(names: Names, rng: np.random.Generator) -> Facts:
    """`Y is 123456.`, far later `X is the same as Y.`; X is asked for, and Y in one of four."""
    first, second, value = names.single(), names.single(), names.number(6)
    direct = rng.random() < 0.25
    statements = [
        Statement(f"{first} is {value}.", veiled=not direct),
        Statement(f"{second} is the same as {first}."),
    ]
    asked = [second, first] if direct else [second]
    questions = [Question(f"What is {key}?", f" {key} is", f" {value}") for key in asked]
    return Facts("", statements, questions)


def tracing(names: Names, rng: np.random.Generator) -> Facts:
    """A chain of two to five variables of one value, listed in order (RULER's vt).

    The instructions come after a solved example with some noise, as RULER's do.
    """
    solved, noise = _chain(names, rng, letters=3), [NOISE] * int(rng.integers(1, 12))
    places = np.sort(rng.integers(0, len(noise) + 1, len(solved.statements))).tolist()
    lines = insert(noise, [statement.text for statement in solved.statements], places)
    example, asked = TRACING.context.format(context="\n".join(lines)), solved.questions[0]
    facts = _chain(names, rng, letters=5 if rng.random() < 0.8 else 3)
    shown = f"{example}{asked.text}{asked.prefix} {asked.answer}"
    return replace(facts, intro=f"{shown}\n\n{facts.intro}")


def _chain(names: Names, rng: np.random.Generator, *, letters: int) -> Facts:
    chain = [names.variable(letters) for _ in range(rng.integers(2, 6))]
    value = names.number(5)
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
    statements = [Statement(line) for line in lines]
    about = {"query": value, "num_v": len(chain)}
    return _facts(TRACING, statements, " ".join(chain), "", **about)


TASKS: dict[str, Task] = {
    task.__name__: task
    for task in (
        single, single_uuid, multi_value, other_values, multi_query, plain, two_hops, tracing,
    )
}  # fmt: skip
