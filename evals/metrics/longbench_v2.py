"""LongBench v2's score (Bai et al. 2024): whether the right one of four choices is named."""

import re

ANSWER = re.compile(r"The correct answer is \(([A-D])\)")
BARE_ANSWER = re.compile(r"The correct answer is ([A-D])")  # "... is Apple" is A, too


def longbench_v2_score(prediction: str, answer: str) -> float:
    """1 where the choice in the prediction is the answer (A, B, C or D), else 0."""
    return float(chosen(prediction) == answer)


def chosen(prediction: str) -> str | None:
    """The letter that a prediction says is the correct answer, asterisks aside; None if none."""
    said = prediction.replace("*", "")
    found = ANSWER.search(said) or BARE_ANSWER.search(said)
    return found[1] if found else None
