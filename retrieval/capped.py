"""Scores as a model caps them."""

import torch
from jaxtyping import Float
from torch import Tensor


def capped(scores: Float[Tensor, "..."], softcap: float | None) -> Float[Tensor, "..."]:
    """softcap · tanh(scores / softcap), as Gemma 2 has them; with None, `scores` themselves."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
