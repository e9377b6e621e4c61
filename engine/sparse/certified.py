"""How much attention a choice of tokens misses at most, from a look at some of the others."""

from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_scores
from engine.model.pieces import AttentionSpec
from retrieval.estimate import certificate

SAMPLED = 512  # tokens looked at, of those that are not selected
DELTA = 0.05  # how often the bound may be wrong


def most_missed(
    q: Float[Tensor, "Hq D"],
    chosen: Float[Tensor, "Hk K D"],
    sample: Float[Tensor, "Hk M D"],
    missing: int,
    spec: AttentionSpec,
    best: Int[Tensor, " N"],
) -> float:
    """The share of attention that the worst query head misses, no less with confidence 0.95.

    Two things are taken on trust: the sample, which the central limit theorem speaks of, and that
    no token that is missing weighs more than the median of those the index selected, for the
    head of the group that wants it most. See `retrieval.estimate.certificate`.

    Args:
        chosen, sample: rotated keys of what is selected, and of tokens drawn from the others.
        missing: how many others there are.
        best: which of the K tokens the index selected, not a rule such as sinks and window.
    """
    kept, others = (attend_scores(q, k, spec) for k in (chosen, sample))  # [Hk, G, K]
    lse = kept.logsumexp(-1, keepdim=True)
    weight = (kept[..., best] - lse).amax(1).median(-1).values  # of a group's keenest head
    ceiling = (weight[:, None] + lse[..., 0]).flatten()
    found = certificate(others.flatten(0, 1), missing, lse.flatten(), ceiling, eps=1.0, delta=DELTA)
    return float(found.upper.max())
