"""Trials of the kernels between scores and rows: groups, the largest keys, who is where."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gpu_bench.trial import Sizes, Trial, size
from kvstore.kernels import resolve
from retrieval.kernels import choose, group
from retrieval.kernels.scores import scored

HITS = 0.6  # of a step's tokens, those that were chosen in the step before
HOT = 2.5  # times the budget: slots of a hot buffer


def grouped(sizes: Sizes) -> Trial:
    """Scores of query heads to one number a token and KV head."""
    raw = sizes.randn(sizes.batch, sizes.query_heads, sizes.tokens, dtype=torch.float32)
    scale = sizes.dim**-0.5
    scores = scored(raw, scale, 512)
    rule = dict(num_kv_heads=sizes.heads, scale=scale, sinks=4, window=16, reduce="max", unit=1)
    asked = scores, sizes.full()
    return Trial(
        run=lambda: [group.keys(*asked, **rule)],
        define=lambda: [group.keys_torch(*asked, **rule)],
        moved=size(scores) + sizes.batch * sizes.heads * sizes.tokens * 4,
        shown=_logs,
    )


def _logs(written: Sequence[Tensor]) -> list[Tensor]:
    """Keys as the numbers they stand for, which may be near; forced ones become infinite."""
    [keys] = written
    bits = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    numbers = bits.view(torch.float32)
    return [torch.where(keys == torch.iinfo(torch.int32).max, torch.inf, numbers)]


def best(sizes: Sizes) -> Trial:
    """The ids of the largest keys, ascending; torch.topk finds the same, in another order."""
    logs = sizes.randn(sizes.batch, sizes.heads, sizes.tokens, dtype=torch.float32)
    bits = logs.view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    asked = keys, sizes.full(), sizes.budget
    return Trial(
        run=lambda: [choose.choose(*asked)],
        define=lambda: [choose.choose_torch(*asked)],
        moved=keys.nbytes + sizes.batch * sizes.heads * sizes.budget * 4,
        beside={
            "torch.topk": lambda: torch.topk(logs, sizes.budget, sorted=False),
            "torch.topk, ids sorted": lambda: (
                torch.topk(logs, sizes.budget, sorted=False).indices.sort().values
            ),
        },
    )


class Walk:
    """Choices that share `HITS` of their tokens with the one before, and the tables they change."""

    def __init__(self, sizes: Sizes) -> None:
        self.slots = round(HOT * sizes.budget) + 16
        self.tables = resolve.empty(
            sizes.batch,
            sizes.heads,
            tokens=sizes.tokens,
            slots=self.slots,
            device=sizes.device,
        )
        self.now = torch.zeros((), dtype=torch.int32, device=sizes.device)
        size = 2, sizes.batch, sizes.heads
        self.counts = torch.zeros(size, dtype=torch.int64, device=sizes.device)
        rows = sizes.batch, sizes.heads, sizes.tokens
        self._order = torch.rand(rows, device=sizes.device).argsort(-1).int()
        self._start, self._sizes = 0, sizes

    def ids(self) -> Tensor:
        """[B, Hk, K], ascending."""
        s = self._sizes
        at = (torch.arange(s.budget, device=s.device) + self._start) % s.tokens
        self._start += round((1 - HITS) * s.budget)
        return self._order[..., at].sort(-1).values


@lru_cache(maxsize=1)
def walk(sizes: Sizes) -> Walk:
    return Walk(sizes)


def resolved(sizes: Sizes) -> Trial:
    """Which of a step's tokens are in the hot buffer, and who leaves for the others."""
    path = walk(sizes)
    ids, tables, now, counts = path.ids(), path.tables, path.now, path.counts

    def run() -> list[Tensor]:
        now.add_(1)
        return [*resolve.resolve(ids, tables, now, counts), *tables, counts]

    def define() -> list[Tensor]:
        own = resolve.Residency(*(x.clone() for x in tables))
        all_counts = counts.clone()
        return [*resolve.resolve_torch(ids, own, now + 1, all_counts), *own, all_counts]

    read = 2 * ids.nbytes + 2 * size(tables[1:])  # of `slot` only what is asked for
    return Trial(run, define, read + 3 * ids.nbytes)
