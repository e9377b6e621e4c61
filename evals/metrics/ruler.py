"""RULER's scores: how many of the answers are in what a model said (Hsieh et al. 2024)."""

import re
from collections.abc import Sequence

from engine.errors import ConfigError

CONTROL = re.compile(r"[\x00-\x1f]")
ANY = ("qa_1", "qa_2")  # one of the references is enough
ALL = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
    "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe",
)  # fmt: skip


def ruler_score(task: str, prediction: str, outputs: Sequence[str]) -> float:
    """0..100: the share of the outputs found in the prediction; for questions, whether any is.

    An output is found where it is a part of the prediction, in upper or lower case, even inside of
    a word: RULER's rule. Its score of a task is the mean over samples, rounded to two places.

    Args:
        prediction: as the model said it; control characters become line ends here.
    Raises:
        ConfigError: no such task, or no outputs.
    """
    if task not in ALL and task not in ANY:
        raise ConfigError(f"RULER has no task {task}; it has {', '.join(ALL + ANY)}")
    if not outputs:
        raise ConfigError(f"{task}: there are no outputs to compare the prediction with")
    said = CONTROL.sub("\n", prediction.strip()).strip().lower()
    found = [output.lower() in said for output in outputs]
    return 100.0 * any(found) if task in ANY else 100.0 * sum(found) / len(found)
