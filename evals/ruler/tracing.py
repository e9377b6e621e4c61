"""Variable tracking: a chain of assignments to follow (RULER, Hsieh et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from evals.fit import fit
from evals.ruler.draft import Draft, insert
from evals.ruler.templates import NOISE, TRACING

VARIABLES = 5  # of the chain: four hops
EXAMPLE_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Tracing:
    """A solved example, then the problem. Sizes: lines of noise around the problem's chain.

    Args:
        example_lines: of noise in the example.
    """

    example_lines: int

    @classmethod
    def make(cls, tokens: Callable[[str], int]) -> "Tracing":
        """With an example of at most 500 tokens, as far as any is as short as that."""

        def cost(lines: int) -> int:
            return tokens(cls(lines)._example(Random(0), 12345))

        shortest = cost(VARIABLES)
        return cls(fit(cost, max(shortest, EXAMPLE_TOKENS), VARIABLES))

    @property
    def least(self) -> int:
        return VARIABLES

    @property
    def most(self) -> None:
        return None

    def draft(self, rng: Random, index: int, size: int) -> Draft:
        asked, other = rng.sample(range(10_000, 100_000), 2)
        example = self._example(rng, other)
        problem = _problem(rng, asked, letters=5, lines=size)
        return Draft(
            f"{example}\n\n{problem.context}", problem.question, problem.prefix, problem.outputs
        )

    def _example(self, rng: Random, value: int) -> str:
        solved = _problem(rng, value, letters=3, lines=self.example_lines)
        return f"{solved.text} {' '.join(solved.outputs)}"


def _problem(rng: Random, value: int, *, letters: int, lines: int) -> Draft:
    names = _names(rng, letters)
    chain = [f"VAR {names[0]} = {value}"]
    # the blank at the end is RULER's
    chain += [f"VAR {name} = VAR {of} " for of, name in pairwise(names)]
    places = sorted(rng.sample(range(lines), len(chain)))
    context = "\n".join(insert([NOISE] * lines, chain, places))
    return Draft.of(TRACING, names, context=context, query=value, num_v=len(names))


def _names(rng: Random, letters: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < VARIABLES:
        name = "".join(rng.choices(ascii_uppercase, k=letters))
        if name != "VAR":  # would read as the keyword
            names[name] = None
    return list(names)
