"""Questions about paragraphs of Wikipedia: SQuAD 2.0 and HotpotQA, from their rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import ConfigError
from evals.rows import Row


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of some documents, by their numbers.

    Args:
        own: that its answer is in, or that come with it.
        near: that are the first to be added, being of the same article.
    """

    text: str
    outputs: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


class Corpus(NamedTuple):
    """Different documents, and the questions about them, in the order of the rows."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


class _Paragraph(NamedTuple):
    title: str
    text: str
    asked: list[tuple[str, tuple[str, ...]]]


def squad(rows: Iterable[Row]) -> Corpus:
    """The paragraphs, and the questions that have an answer.

    Args:
        rows: of articles with paragraphs, as the official file has them (or that file as the only
            row), or of single questions, as the hub's `squad_v2` has them.
    Raises:
        ConfigError: a row is of no such form, or no question has an answer.
    """
    paragraphs = [x for row in _parsed("SQuAD", rows, _paragraphs) for x in row]
    numbers = _numbered(x.text for x in paragraphs)
    articles: dict[str, dict[int, None]] = {}
    for x in paragraphs:
        articles.setdefault(x.title, {})[numbers[x.text]] = None
    questions = [
        Question(text, outputs, (own,), tuple(n for n in articles[x.title] if n != own))
        for x in paragraphs
        for own in [numbers[x.text]]
        for text, outputs in x.asked
        if outputs
    ]
    return _corpus("SQuAD", numbers, questions)


def _paragraphs(row: Row) -> list[_Paragraph]:
    if "data" in row:
        return [x for article in row["data"] for x in _paragraphs(article)]
    if "paragraphs" not in row:
        asked = (str(row["question"]), tuple(map(str, row["answers"]["text"])))
        return [_Paragraph(str(row["title"]), str(row["context"]), [asked])]
    return [
        _Paragraph(str(row["title"]), str(x["context"]), [_official(qa) for qa in x["qas"]])
        for x in row["paragraphs"]
    ]


def _official(qa: Row) -> tuple[str, tuple[str, ...]]:
    answers = () if qa.get("is_impossible") else qa["answers"]
    return str(qa["question"]), tuple(str(x["text"]) for x in answers)


def hotpotqa(rows: Iterable[Row]) -> Corpus:
    """The paragraphs, titles in front, and the questions; each owns the paragraphs of its row.

    Args:
        rows: with `question`, `answer` and `context`: pairs of title and sentences, as the official
            file has them, or lists `title` and `sentences`, as the hub's `hotpot_qa` has them.
    Raises:
        ConfigError: a row is of no such form, or there is none.
    """
    parsed = list(_parsed("HotpotQA", rows, _hops))
    numbers = _numbered(text for _, _, texts in parsed for text in texts)
    questions = [
        Question(text, (answer,), tuple(dict.fromkeys(numbers[x] for x in texts)))
        for text, answer, texts in parsed
    ]
    return _corpus("HotpotQA", numbers, questions)


def _hops(row: Row) -> tuple[str, str, list[str]]:
    found = row["context"]
    pairs = zip(found["title"], found["sentences"], strict=True) if "title" in found else found
    texts = [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]
    return str(row["question"]), str(row["answer"]), texts


def _parsed(name: str, rows: Iterable[Row], parse: Callable[[Row], Any]) -> Iterator[Any]:
    for number, row in enumerate(rows):
        try:
            yield parse(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"row {number} is none of {name}: {type(error).__name__}: {error}"
            ) from error


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _corpus(name: str, numbers: Mapping[str, int], questions: list[Question]) -> Corpus:
    if not questions:
        raise ConfigError(f"there is no question with an answer in these rows of {name}")
    return Corpus(tuple(numbers), tuple(questions))
