"""Rows written where there is something to write, whatever that turns out to be."""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def put(
    memory: Shaped[Tensor, "rows ..."], at: Int[Tensor, " n"], values: Shaped[Tensor, "n ..."]
) -> None:
    """memory[at[i]] = values[i], except where `at` is -1; shapes do not depend on `at`.

    What has nothing to write repeats what another writes; if nobody writes, row 0 is written with
    what it holds. Other places are given once each.
    """
    writes = at >= 0
    first = writes.int().argmax()
    source = torch.arange(len(at), device=at.device).where(writes, first)
    rows = at[source].clamp_min(0).long()
    memory.index_copy_(0, rows, values[source].where(writes.any(), memory[rows]))
