"""Load stored KV or compute it, and how much to compute anew: measured speeds, and what follows."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

MEMORY = 0.5  # of an estimate is what was measured before, the rest is the last measurement
FORGET = 0.9  # what a measurement of prefill still weighs one measurement later
HYSTERESIS = 0.9  # the other way must take less than so much of the time of the way taken last
HIDE = 0.9  # of the time of loading may be filled with computing
EXPLORE = 0.03  # of the time of computing may go into trying whether loading became faster


@dataclass(frozen=True, slots=True)
class Work:
    """A prompt whose middle could be reused.

    Args:
        reusable: tokens whose KV is stored and may be loaded.
        fresh: tokens that are computed in any case: the question, what is missing.
        loads: bytes of the reusable tokens by the tier they rest in.
        share: of the reusable tokens that must be computed anew for the answer's quality.
        start: tokens in front of all that, already there (an exact prefix).
    """

    reusable: int
    fresh: int
    loads: Mapping[str, int]
    share: float
    start: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a prompt, and why.

    Args:
        load: whether stored KV is used at all; if not, `share` is 1.
        share: of the reusable tokens to compute anew.
        reason: for people.
    """

    load: bool
    share: float
    reason: str


class PerfModel:
    """Speeds of loading and of prefill as measured, and the way that is faster by them.

    Loading and computing overlap, layer by layer, so tokens computed while others load cost
    nothing: the share is raised up to that point (CacheBlend's controller, Yao et al. 2025). Where
    loading is slower than prefill nothing is loaded, but now and then it is tried, for a bounded
    part of the time, so that a tier which became faster is found out. Thread-safe.

    Args:
        steps: parts, one after the other, in which KV is loaded and computed (layers, or groups).
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._lock = threading.Lock()  # guards everything below
        self._prefill = _Prefill()
        self._loads: dict[str, _Bandwidth] = {}
        self._blend = 1.0  # seconds of scattered tokens, by those that prefill would take
        self._loading: dict[frozenset[str], bool] = {}  # the way taken last, by tiers
        self._spare_s: dict[frozenset[str], float] = {}  # may be spent on trying to load

    def prefilled(self, tokens: int, seconds: float, *, start: int = 0) -> None:
        """Learn from a prefill of `tokens` behind `start` others."""
        with self._lock:
            if tokens > 0 and seconds > 0:
                self._prefill.learn(float(tokens), float((start + tokens) ** 2 - start**2), seconds)

    def loaded(self, tier: str, nbytes: int, seconds: float) -> None:
        """Learn from bytes that came from a tier."""
        with self._lock:
            if nbytes > 0 and seconds > 0:
                self._loads.setdefault(tier, _Bandwidth()).learn(nbytes, seconds)

    def blended(self, work: Work, share: float, seconds: float) -> None:
        """Learn from the computing part of a blend, waiting for loads not included."""
        if seconds <= 0:
            return
        with self._lock:
            if expected := self._prefill.blend(work, share):
                self._blend = MEMORY * self._blend + (1 - MEMORY) * seconds / expected
            elif any(computed := _computed(work, share)):  # better than to know nothing
                self._prefill.learn(*computed, seconds)

    def decide(self, work: Work) -> Decision:
        """The faster way to the first token that computes at least `work.share` anew."""
        with self._lock:
            return self._decide(work)

    def decide_start(self, work: Work, least_s: float) -> Decision:
        """The faster way to the first token of a plain prompt, whose stored start needs no repair.

        What is loaded in less than `least_s` seconds is loaded.
        """
        with self._lock:
            full_s, load_s = self._prefill.full(work), self._load_s(work)
            if full_s is None or load_s is None or load_s < least_s:
                return Decision(True, 0.0, "load: no speeds yet, or soon there")
            expected_s = self._pipelined(load_s, self._prefill.blend(work, 0.0) or 0.0)
            return self._choose(work, 0.0, load_s=load_s, expected_s=expected_s, full_s=full_s)

    def _decide(self, work: Work) -> Decision:
        if not work.reusable:
            return Decision(False, 1.0, "compute: nothing to reuse")
        full_s, load_s = self._prefill.full(work), self._load_s(work)
        if full_s is None:
            return Decision(True, work.share, "load: prefill was not measured yet; share as asked")
        if load_s is None:
            reason = f"load: {_names(work)} was not measured yet; share as asked"
            return Decision(True, work.share, reason)
        share = self._hidden_share(work, load_s)
        expected_s = self._pipelined(load_s, self._compute_s(work, share))
        return self._choose(work, share, load_s=load_s, expected_s=expected_s, full_s=full_s)

    def _choose(
        self, work: Work, share: float, *, load_s: float, expected_s: float, full_s: float
    ) -> Decision:
        """The faster one, unless the way taken last is hardly slower."""
        tiers = frozenset(tier for tier, nbytes in work.loads.items() if nbytes)
        before = self._loading.get(tiers)
        loading = expected_s < full_s
        if before is not None and before != loading:
            better, worse = sorted((expected_s, full_s))
            loading = loading if better < HYSTERESIS * worse else before
        self._loading[tiers] = loading
        loads = _loads(work, load_s)
        if loading:
            versus = f"{expected_s:.3g} s with computing, prefill {full_s:.3g} s"
            reason = f"load: {loads}, {versus}; {_share_reason(share, work.share)}"
            return Decision(True, share, reason)
        if self._may_try(tiers, expected_s - full_s, full_s):
            reason = f"load: {loads} was no faster than prefill when last measured; tried again"
            return Decision(True, share, reason)
        reason = f"compute: loading {loads} is no faster than prefill in {full_s:.3g} s"
        return Decision(False, 1.0, reason)

    def _may_try(self, tiers: frozenset[str], loss_s: float, full_s: float) -> bool:
        """Whether enough time was spent computing that a loss of `loss_s` does not matter."""
        spare = self._spare_s.get(tiers, 0.0) + EXPLORE * full_s
        trying = spare >= max(loss_s, 0.5 * full_s)
        self._spare_s[tiers] = 0.0 if trying else spare
        return trying

    def _hidden_share(self, work: Work, load_s: float) -> float:
        """The share asked for, or the larger one that computes while the rest loads."""
        if self._steps == 1:  # everything is loaded before anything is computed
            return work.share
        least, whole = self._compute_s(work, 0.0), self._compute_s(work, 1.0)
        hidden = (HIDE * load_s - least) / (whole - least)
        return min(1.0, max(work.share, hidden))

    def _compute_s(self, work: Work, share: float) -> float:
        return self._blend * (self._prefill.blend(work, share) or 0.0)

    def _load_s(self, work: Work) -> float | None:
        """Seconds of all loads, one tier after the other; None if one was never measured."""
        total = 0.0
        for tier, nbytes in work.loads.items():
            if nbytes and tier not in self._loads:
                return None
            total += nbytes / self._loads[tier].rate(nbytes) if nbytes else 0.0
        return total

    def _pipelined(self, load_s: float, compute_s: float) -> float:
        """Two stages over the steps: the first load, the slower stage in between, the last step."""
        inner = (self._steps - 1) * max(load_s, compute_s)
        return (load_s + inner + compute_s) / self._steps


@dataclass(slots=True)
class _Prefill:
    """Least squares of seconds = a * tokens + b * pairs over past prefills, in relative error.

    Pairs: n^2 for n tokens from the start on, so twice the (query, key) pairs of a causal prefill.
    """

    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    xt: float = 0.0
    yt: float = 0.0

    def learn(self, tokens: float, pairs: float, seconds: float) -> None:
        x, y = tokens / seconds, pairs / seconds
        new = (x * x, x * y, y * y, x, y)
        old = (self.xx, self.xy, self.yy, self.xt, self.yt)
        self.xx, self.xy, self.yy, self.xt, self.yt = (
            FORGET * was + now for was, now in zip(old, new, strict=True)
        )

    def full(self, work: Work) -> float | None:
        """Seconds of a prefill of everything; None before the first measurement."""
        return self.blend(work, 1.0)

    def blend(self, work: Work, share: float) -> float | None:
        """Seconds of the fresh tokens and a share of the reusable ones, spread evenly."""
        if not self.xx:
            return None
        (a, b), (tokens, pairs) = self._fit(), _computed(work, share)
        return a * tokens + b * pairs

    def _fit(self) -> tuple[float, float]:
        """a and b, neither below zero; b is zero while all prefills had one length."""
        determinant = self.xx * self.yy - self.xy**2
        if determinant <= 1e-9 * self.xx * self.yy:
            return self.xt / self.xx, 0.0
        a = (self.xt * self.yy - self.yt * self.xy) / determinant
        b = (self.yt * self.xx - self.xt * self.xy) / determinant
        if b < 0:
            return self.xt / self.xx, 0.0
        return (a, b) if a > 0 else (0.0, self.yt / self.yy)


@dataclass(slots=True)
class _Bandwidth:
    """Bytes per second of a tier by size: small loads are slower, they wait as long to begin."""

    rates: dict[int, float] = field(default_factory=dict)  # by the size's power of 4

    def learn(self, nbytes: int, seconds: float) -> None:
        size, rate = _size(nbytes), nbytes / seconds
        before = self.rates.get(size, rate)
        self.rates[size] = 1 / (MEMORY / before + (1 - MEMORY) / rate)  # mean of the times

    def rate(self, nbytes: int) -> float:
        """Of the measured size nearest to this one."""
        return self.rates[min(self.rates, key=lambda size: (abs(size - _size(nbytes)), size))]


def _computed(work: Work, share: float) -> tuple[float, float]:
    """Tokens, and pairs as in `_Prefill`, of the fresh tokens and a share of the reusable ones."""
    end, some = work.start + work.reusable, share * work.reusable
    last = (end + work.fresh) ** 2 - end**2
    return some + work.fresh, some * (2 * work.start + work.reusable) + last


def _size(nbytes: int) -> int:
    return (nbytes.bit_length() - 1) // 2


def _names(work: Work) -> str:
    return " and ".join(sorted(tier for tier, nbytes in work.loads.items() if nbytes))


def _loads(work: Work, load_s: float) -> str:
    if not load_s:
        return "in 0 s what was computed just now"
    rate = sum(work.loads.values()) / load_s / 1e9
    return f"{load_s:.3g} s from {_names(work)} at {rate:.2g} GB/s"


def _share_reason(share: float, asked: float) -> str:
    if share > asked:
        return f"share {share:.2f} instead of {asked:.2f}: the rest hides behind loading"
    return f"share {share:.2f} as asked"
