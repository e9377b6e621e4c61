"""MuSiQue: questions of two to four hops about paragraphs of Wikipedia (Trivedi et al. 2022)."""

from collections.abc import Iterable
from typing import NamedTuple

from engine.errors import ConfigError
from evals.rows import Row


class Question(NamedTuple):
    """A question, its answers, and paragraphs in the row's order; `needed` ones hold the answer."""

    text: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]
    needed: tuple[int, ...]

    def some(self, count: int) -> list[str]:
        """As many paragraphs: the needed ones, and the first of the others; in order."""
        others = [i for i in range(len(self.paragraphs)) if i not in self.needed]
        chosen = {*self.needed, *others[: max(0, count - len(self.needed))]}
        return [self.paragraphs[i] for i in sorted(chosen)]


def musique(rows: Iterable[Row]) -> list[Question]:
    """The questions that have an answer; a paragraph is its title and its text.

    Args:
        rows: with `question`, `answer`, `answer_aliases` and `paragraphs`, as the official file.
    Raises:
        ConfigError: a row is of no such form, or there is no question with an answer.
    """
    found = []
    for number, row in enumerate(rows):
        try:
            if row.get("answerable", True):
                found.append(_question(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"row {number} is none of MuSiQue: {type(error).__name__}: {error}"
            ) from error
    if not found:
        raise ConfigError("there is no question with an answer in these rows of MuSiQue")
    return found


def _question(row: Row) -> Question:
    paragraphs = row["paragraphs"]
    return Question(
        str(row["question"]),
        tuple(map(str, (row["answer"], *row.get("answer_aliases", ())))),
        tuple(f"{x['title']}\n{x['paragraph_text']}\n\n" for x in paragraphs),
        tuple(i for i, x in enumerate(paragraphs) if x["is_supporting"]),
    )
