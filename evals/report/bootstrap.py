"""How far a mean of few samples can be trusted: the bootstrap (Efron 1979), seeded by name."""

from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 4000
LEVEL = 0.95


def resampled_means(values: Float[np.ndarray, " N"], name: str) -> Float[np.ndarray, " R"]:
    """Means of `values` drawn again with replacement.

    Args:
        name: seeds the draws: the same for the same name and number of values, in every process.
    """
    centre = values.mean()
    return centre + _draws(name, len(values)) @ (values - centre) / len(values)


def interval(means: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The percentile interval of 95 % of resampled means."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each of `count` values is drawn, a row for each of `RESAMPLES` times."""
    generator = np.random.default_rng(list(sha256(name.encode()).digest()))
    drawn = generator.integers(count, size=(RESAMPLES, count))
    drawn += count * np.arange(RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=RESAMPLES * count)
    return times.reshape(RESAMPLES, count).astype(np.float64)
