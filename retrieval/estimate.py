"""Attention to what is not selected: an estimate of it, and a bound on its share."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrieval.capped import capped
from retrieval.pending import Rows, products

RUN_TOKENS = 4096  # summarised at once
CLUSTER_TOKENS = 128
MOST_WIDENING = 2.0  # of a cluster's logit: one strange key must not widen it without end


class Estimate(NamedTuple):
    """Attention over some tokens, to be merged with that over the others by log-sum-exp."""

    out: Float[Tensor, "Hq D"]
    lse: Float[Tensor, " Hq"]  # -inf, and out 0, if there are no tokens


class Tail:
    """A stand-in for all tokens of one layer and request, of which any may be left out.

    Clusters are runs of consecutive tokens, so that no table says which token is where. Each is
    attended to as so many tokens with one key and value, the means of those not selected (the
    estimation zone of RetroInfer, 2025, which clusters by k-means). A last, partial run counts.

    Args:
        cluster_tokens: 1 makes the estimate exact. A cluster takes 8 D + 4 bytes a KV head.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2); None for none.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        cluster_tokens: int = CLUSTER_TOKENS,
        softcap: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if cluster_tokens < 1:
            raise ValueError(f"need cluster_tokens >= 1, got {cluster_tokens}")
        self.length = 0  # tokens there are
        self.cluster_tokens, self.softcap = cluster_tokens, softcap
        self._rows = Rows(num_kv_heads, (2 * head_dim + 1,), torch.float32, device)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def summaries(self) -> Float[Tensor, "Hk C F"]:
        """Mean key, mean value and variance of the keys of every cluster, the last one begun."""
        return self._rows.view

    def append(self, keys: Float[Tensor, "Hk N D"], values: Float[Tensor, "Hk N D"]) -> None:
        """The next N tokens, keys rotated: a prompt in any cut, then generated ones."""
        begun = min(-self.length % self.cluster_tokens, keys.shape[1])
        if begun:
            self._join(_summarised(keys[:, None, :begun], values[:, None, :begun]), begun)
        run = RUN_TOKENS // self.cluster_tokens * self.cluster_tokens or self.cluster_tokens
        for k, v in zip(
            keys[:, begun:].split(run, 1), values[:, begun:].split(run, 1), strict=True
        ):
            whole = k.shape[1] // self.cluster_tokens * self.cluster_tokens
            if whole:
                folded = (x[:, :whole].unflatten(1, (-1, self.cluster_tokens)) for x in (k, v))
                self._rows.append(_summarised(*folded))
            if whole < k.shape[1]:
                self._rows.append(_summarised(k[:, None, whole:], v[:, None, whole:]))
            self.length += k.shape[1]

    def _join(self, more: Float[Tensor, "Hk 1 F"], count: int) -> None:
        """These tokens belong to the cluster that is begun."""
        last = self._rows.view[:, -1:]
        last[:] = joined(last, self.length % self.cluster_tokens, more, count)
        self.length += count

    def estimate(
        self,
        query: Float[Tensor, "Hq D"],
        ids: Int[Tensor, "Hk K"],
        keys: Float[Tensor, "Hk K D"],
        values: Float[Tensor, "Hk K D"],
        scale: float,
    ) -> Estimate:
        """Attention over every token that is not selected, estimated.

        Args:
            ids: the selected tokens, none twice.
            keys, values: theirs, which are taken out of their clusters. Where they come from a
                codec they differ a little from what `append` took, and so does what is left.
            scale: factor on q · k.
        """
        rows, counts = self.summaries, self._counts()
        means, spread = rows[..., :-1].chunk(2, -1), rows[:, None, :, -1]
        touched = (ids // self.cluster_tokens).long()
        left = counts.scatter_add(1, touched, -torch.ones_like(touched, dtype=counts.dtype))
        divisor = left.clamp_min(1)[:, None]
        folded = query.float().unflatten(0, (len(ids), -1))
        where = touched[:, None].expand(-1, folded.shape[1], -1)
        sums = folded @ means[0].mT * counts[:, None]  # of q · k over each cluster
        sums.scatter_add_(2, where, -products(query, keys).view(where.shape))
        logits = sums * scale / divisor + _widening(folded, spread, scale)
        shares, lse = _softmax(capped(logits, self.softcap) + left.log()[:, None])
        weights = shares / divisor
        out = (weights * counts[:, None]) @ means[1] - weights.gather(2, where) @ values.float()
        return Estimate(out.flatten(0, 1).to(query.dtype), lse.flatten())

    def _counts(self) -> Float[Tensor, "Hk C"]:
        """Tokens of each cluster."""
        rows = self.summaries
        starts = torch.arange(rows.shape[1], device=rows.device) * self.cluster_tokens
        counts = (self.length - starts).clamp_max(self.cluster_tokens).float()
        return counts.expand(len(rows), -1)


def alone(keys: Float[Tensor, "... D"], values: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """The summaries of single tokens."""
    return F.pad(torch.cat([keys, values], -1).float(), (0, 1))


def joined(
    one: Float[Tensor, "... F"], n: int | Tensor, other: Float[Tensor, "... F"], m: int
) -> Float[Tensor, "... F"]:
    """The summary of n tokens and m others (Chan, Golub and LeVeque 1979); of m alone if n is 0."""
    share = m / (n + m)
    off = other - one
    row = one + share * off
    dim = (off.shape[-1] - 1) // 2
    row[..., -1:] += share * (1 - share) * off[..., :dim].square().mean(-1, keepdim=True)
    return row


def _summarised(
    keys: Float[Tensor, "Hk U N D"], values: Float[Tensor, "Hk U N D"]
) -> Float[Tensor, "Hk U F"]:
    """Mean key, mean value, and variance of the keys of runs of tokens."""
    if keys.shape[2] == 1:
        return alone(keys[:, :, 0], values[:, :, 0])
    spread, mean = torch.var_mean(keys.float(), 2, correction=0)
    return torch.cat([mean, values.float().mean(2), spread.mean(-1, keepdim=True)], -1)


def _widening(
    query: Float[Tensor, "Hk G D"], spread: Float[Tensor, "Hk 1 C"], scale: float
) -> Float[Tensor, "Hk G C"]:
    """By how much the logarithm of a mean of exponentials is above the mean of the logits.

    Half their variance, were they Gaussian and the keys of a cluster alike in all directions.
    """
    variance = scale * scale * query.square().sum(-1, keepdim=True) * spread
    return (variance / 2).clamp_max(MOST_WIDENING)


def _softmax(
    logits: Float[Tensor, "Hk G C"],
) -> tuple[Float[Tensor, "Hk G C"], Float[Tensor, "Hk G"]]:
    """Shares, and the log-sum-exp; 0 and -inf where every logit is -inf."""
    lse = logits.logsumexp(-1)
    finite = lse.clamp_min(torch.finfo(lse.dtype).min)
    return (logits - finite[..., None]).exp(), lse


class Certificate(NamedTuple):
    """How much of the attention of each query head a selection misses."""

    lse: Float[Tensor, " Hq"]  # logarithm of an unbiased estimate of the exponentials it misses
    missed: Float[Tensor, " Hq"]  # their share of all
    upper: Float[Tensor, " Hq"]  # no smaller than the true share, with confidence 1 - delta
    needed: Int[Tensor, " Hq"]  # tokens to draw for an error of the sum of all below eps
    escalate: Bool[Tensor, " Hq"]  # upper > eps: select more, or draw more


def draw(
    ids: Int[Tensor, "Hk K"], length: int, count: int, generator: torch.Generator | None = None
) -> Int[Tensor, "Hk M"]:
    """`count` tokens of those not selected, uniformly and with replacement; none if there are none.

    Args:
        ids: the selected tokens, ascending and without repetition.
        length: tokens there are.
    """
    heads, selected = ids.shape
    size = (heads, count if length > selected else 0)
    most = max(1, length - selected)
    ranks = torch.randint(most, size, generator=generator, device=ids.device)
    before = ids.long() - torch.arange(selected, device=ids.device)  # not selected, below each
    return ranks + torch.searchsorted(before.contiguous(), ranks, right=True)


def certificate(
    logits: Float[Tensor, "Hq M"],
    missing: int,
    selected: Float[Tensor, " Hq"],
    ceiling: Float[Tensor, " Hq"],
    *,
    eps: float = 0.05,
    delta: float = 0.05,
) -> Certificate:
    """A bound on the attention that a selection misses, from a sample of what it left out.

    The central limit theorem sizes the error and the sample, (z σ n / (ε D))² tokens, as in
    vAttention (2026); σ is not the sample's but an upper bound on it (Maurer and Pontil 2009,
    Theorem 10), as a sample says nothing of a token that is rare and heavy.

    Args:
        logits: scaled and exact, of the tokens that `draw` chose.
        missing: tokens that are not selected.
        selected: log-sum-exp of the logits of those that are.
        ceiling: no logit that is missing is larger. Of an exact index, the smallest that was
            selected; of one that estimates, more by its error; a bound where scores are bounds.
    Raises:
        ValueError: for eps or delta out of range, or fewer than two tokens in the sample.
    """
    if not (eps > 0 and 0 < delta < 1):
        raise ValueError(f"need eps > 0 and 0 < delta < 1, got {eps}, {delta}")
    if missing == 0:
        return _nothing_missed(selected)
    count = logits.shape[1]
    if count < 2:
        raise ValueError(f"a certificate needs a sample of two tokens or more, got {count}")
    ceiling = torch.maximum(ceiling, logits.amax(-1)).double()
    top = torch.maximum(ceiling, selected.double())
    weights, kept = (logits.double() - top[:, None]).exp(), (selected.double() - top).exp()
    mean = weights.mean(-1)
    doubt = math.sqrt(2 * math.log(1 / delta) / (count - 1))
    sigma = weights.std(-1) + (ceiling - top).exp() * doubt
    least, most = mean * missing, (mean + _quantile(delta) * sigma / count**0.5) * missing
    size = (_quantile(delta / 2) * sigma * missing / (eps * (kept + least))).square()
    upper = most / (kept + most)
    return Certificate(
        lse=(least.log() + top).float(),
        missed=(least / (kept + least)).float(),
        upper=upper.float(),
        needed=size.clamp(1, missing).ceil().long(),
        escalate=upper > eps,
    )


def _nothing_missed(selected: Float[Tensor, " Hq"]) -> Certificate:
    zeros = torch.zeros_like(selected, dtype=torch.float32)
    none = zeros.long()
    return Certificate(zeros - torch.inf, zeros, zeros, none, none > 0)


def _quantile(tail: float) -> float:
    """Of the normal distribution: what it exceeds with this probability."""
    return NormalDist().inv_cdf(1 - tail)
