"""ROUGE-L of summaries (Lin 2004), with the numbers of the Python package `rouge` 1.0.1.

Published LongBench scores are made with that package, which counts *different* words: of the text,
of the reference, and of what both have in order, sentence by sentence. Sentences end at full
stops. Here nothing recurses: the package fails, and LongBench then counts 0, where two sentences
have about a thousand words together, depending on who calls it.
"""

from collections.abc import Sequence


def rouge_l(text: str, reference: str) -> float:
    """F of precision and recall, 0..1; 0 where one of the two has nothing but full stops."""
    ours, theirs = _sentences(text), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    shared: set[str] = set()
    for there in theirs:
        for here in ours:
            shared |= _in_order(there, here)
    recall = len(shared) / len({word for there in theirs for word in there})
    precision = len(shared) / len({word for here in ours for word in here})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of blanks alone has one word, the empty one."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _in_order(x: Sequence[str], y: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence: of several, the one that `rouge` finds."""
    lengths = _table(x, y)
    found: set[str] = set()
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.add(x[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _table(x: Sequence[str], y: Sequence[str]) -> list[list[int]]:
    """Lengths of the longest common subsequences of x[:i] and y[:j], at [i][j]."""
    above = [0] * (len(y) + 1)
    rows = [above]
    for word in x:
        row = [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
        above = row
    return rows
