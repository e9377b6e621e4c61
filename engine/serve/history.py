"""What the last minutes were like: rates between readings of counters, and quantiles."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from engine.serve.report import Past, Quantiles

PERIOD_S = 5.0
SAMPLES = 61  # five minutes
WINDOW_S = PERIOD_S * (SAMPLES - 1)
REQUESTS = 4096


class Sample(NamedTuple):
    """Counters at one time; `hits` and `lookups` by tier."""

    at: float
    prompt: int
    cached: int
    generated: int
    hits: Mapping[str, int]
    lookups: Mapping[str, int]


class History:
    """Readings of counters, at most one in five seconds. There is no thread that takes them.

    Whoever has a reason to look (a request that ended, somebody who asks) offers one. Nobody looks
    while nothing happens, and then the next stretch is a longer one.
    """

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)

    def due(self, at: float) -> bool:
        """Whether a reading would be kept."""
        return not self._samples or at - self._samples[-1].at >= PERIOD_S

    def note(self, sample: Sample) -> None:
        """Keep a reading, if one is due."""
        if self.due(sample.at):
            self._samples.append(sample)

    def generated_per_s(self, now: Sample) -> float | None:
        """Over the last five seconds or somewhat more; None before there were five."""
        before = [sample for sample in self._samples if now.at - sample.at >= PERIOD_S]
        return _per_s(before[-1], now) if before else None

    def past(self, now: float) -> Past:
        """Every stretch of the last five minutes."""
        kept = [s for s in self._samples if now - s.at <= WINDOW_S]
        pairs = list(pairwise(kept))
        tiers = list(kept[-1].hits) if kept else []
        return Past(
            seconds_ago=[round(now - b.at, 1) for _, b in pairs],
            generated_per_s=[_per_s(a, b) for a, b in pairs],
            cached_ratio=[ratio(b.cached - a.cached, b.prompt - a.prompt) for a, b in pairs],
            hit_ratio={tier: [_hits(tier, a, b) for a, b in pairs] for tier in tiers},
        )


class Recorded(NamedTuple):
    """How long one request took; None where it had no such time."""

    at: float
    ttft_s: float | None
    tpot_s: float | None
    queue_s: float | None


class Latencies:
    """Of the last requests."""

    def __init__(self) -> None:
        self._requests: deque[Recorded] = deque(maxlen=REQUESTS)

    def note(self, request: Recorded) -> None:
        self._requests.append(request)

    def recent(self, now: float) -> list[Recorded]:
        """Those of the window."""
        return [request for request in self._requests if now - request.at <= WINDOW_S]


def quantiles(values: Sequence[float | None]) -> Quantiles:
    """By the nearest rank, of those that are there."""
    known = sorted(value for value in values if value is not None)

    def at(share: float) -> float | None:
        return known[math.ceil(share * len(known)) - 1] if known else None

    return Quantiles(count=len(known), p50=at(0.5), p90=at(0.9), p99=at(0.99))


def ratio(part: int | float, whole: int | float) -> float | None:
    """None of nothing; never outside of 0 to 1, though counters are not read at one instant."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


def _per_s(a: Sample, b: Sample) -> float | None:
    return max(0, b.generated - a.generated) / (b.at - a.at) if b.at > a.at else None


def _hits(tier: str, a: Sample, b: Sample) -> float | None:
    if tier not in a.hits or tier not in b.hits:
        return None
    return ratio(b.hits[tier] - a.hits[tier], b.lookups[tier] - a.lookups[tier])
