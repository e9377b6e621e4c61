"""What every scoring kernel gives: raw estimates, and the statistics that their softmax needs.

A part is a run of neighbouring units that one program scores. It leaves the largest of its scaled
scores and the sum of exponentials below it, so that the softmax's denominator is known without
the scores being read again (online softmax, Milakov and Gimelshein 2018).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn import functional as F


class Scores(NamedTuple):
    """Scores of a batch; U is the capacity in units, P the number of parts (a kernel's choice).

    raw: estimates of q · k, unscaled; -inf for units that do not exist.
    top: of each part, the largest scale * raw; -inf where a part has no unit.
    total: of each part, the sum of exp(scale * raw - top); 0 where it has no unit.
    """

    raw: Float32[Tensor, "B Hq U"]
    top: Float32[Tensor, "B Hq P"]
    total: Float32[Tensor, "B Hq P"]


def lse(scores: Scores) -> Float32[Tensor, "B Hq"]:
    """log of the sum of exp(scale * raw) over all units; -inf where there is none.

    NaN if a score of the head is NaN or +inf, as every probability of that head is then.
    """
    return torch.logsumexp(scores.top + scores.total.log(), -1)


def scored(raw: Float32[Tensor, "B Hq U"], scale: float, part: int) -> Scores:
    """The statistics of scores that are there already, in parts of `part` units.

    Args:
        raw: -inf for units that do not exist.
    """
    logs = (raw * scale).where(raw != -torch.inf, -torch.inf)  # a scale of 0 makes NaN of -inf
    logs = F.pad(logs, (0, -raw.shape[-1] % part), value=-torch.inf).unflatten(-1, (-1, part))
    top = logs.amax(-1)
    below = logs - top.where(top != -torch.inf, 0.0)[..., None]
    return Scores(raw, top, below.exp().sum(-1))
