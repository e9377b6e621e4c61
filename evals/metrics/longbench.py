"""LongBench's scores (Bai et al. 2023), number for number, odd rules included.

Its code needs `fuzzywuzzy`, which gives other numbers where python-Levenshtein is installed:
here it is difflib's ratio, as LongBench's own requirements have it. ROUGE-L is that of the package
`rouge` 1.0.1 (see `evals.metrics.rouge`), Chinese words those of `jieba`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import TypeAlias

from engine.errors import ConfigError
from evals.metrics.chinese import without_punctuation, words
from evals.metrics.rouge import rouge_l

Metric: TypeAlias = Callable[[str, str, Sequence[str]], float]
FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum", "lsht")  # few-shot: what follows is one more shot
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def longbench_score(
    dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """0..1, the best over the answers; the score of a data set is its mean in percent.

    Args:
        dataset: one of the 21, e.g. `hotpotqa`.
        prediction: as the model said it; what LongBench cuts off is cut off here.
        all_classes: the row's, which `trec` and `lsht` choose from.
    Raises:
        ConfigError: no such data set, or the row lacks what its metric needs.
    """
    if dataset not in METRICS:
        raise ConfigError(f"LongBench has no data set {dataset}; it has {', '.join(METRICS)}")
    metric = METRICS[dataset]
    if metric is _classification and not all_classes:
        raise ConfigError(f"{dataset} is scored among all_classes, and there are none")
    if dataset in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    scores = (metric(prediction, answer, all_classes or ()) for answer in answers)
    return max(scores, default=0.0)


def _question(prediction: str, answer: str, _: Sequence[str]) -> float:
    return _f1(_english(prediction), _english(answer))


def _question_zh(prediction: str, answer: str, _: Sequence[str]) -> float:
    return _f1(without_punctuation(words(prediction)), without_punctuation(words(answer)))


def _summary(prediction: str, answer: str, _: Sequence[str]) -> float:
    return rouge_l(prediction, answer)


def _summary_zh(prediction: str, answer: str, _: Sequence[str]) -> float:
    return rouge_l(" ".join(words(prediction)), " ".join(words(answer)))


def _classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that are named, where the right one is among them.

    Classes that are a part of the right one's name should not count. The list shrinks under the
    loop, as it does in LongBench: the one behind a class that is taken out is never looked at.
    """
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def _count(prediction: str, answer: str, _: Sequence[str]) -> float:
    """Share of the right number in all numbers that are said."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def _paragraph(word: str) -> Metric:
    def score(prediction: str, answer: str, classes: Sequence[str]) -> float:
        right = re.search(rf"{word}(\d+)", answer)
        if right is None:
            raise ConfigError(f"the answer should be {word}NUMBER, and is {answer!r}")
        return _count(prediction, right[1], classes)

    return score


def _code(prediction: str, answer: str, _: Sequence[str]) -> float:
    """How alike the next line is: the first one said that looks neither fenced nor commented."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def _english(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, each counted as often as it occurs."""
    same = (Counter(prediction) & Counter(answer)).total()
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


METRICS: dict[str, Metric] = {
    "narrativeqa": _question,
    "qasper": _question,
    "multifieldqa_en": _question,
    "multifieldqa_zh": _question_zh,
    "hotpotqa": _question,
    "2wikimqa": _question,
    "musique": _question,
    "dureader": _summary_zh,
    "gov_report": _summary,
    "qmsum": _summary,
    "multi_news": _summary,
    "vcsum": _summary_zh,
    "trec": _classification,
    "triviaqa": _question,
    "samsum": _summary,
    "lsht": _classification,
    "passage_count": _count,
    "passage_retrieval_en": _paragraph("Paragraph "),
    "passage_retrieval_zh": _paragraph("段落"),
    "lcc": _code,
    "repobench-p": _code,
}
