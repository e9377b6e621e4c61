"""Traces and sizes that several tests use."""

import torch

from evals.fixtures import Size
from evals.trace import Space, Trace

SIZES = [
    Size(tokens=1000),
    Size(tokens=1027, head_dim=64, kv_heads=3, group=1, queries=1),
    Size(tokens=5000, head_dim=80, kv_heads=1, group=8, queries=5),
    Size(tokens=20000, head_dim=64, kv_heads=2, group=2, queries=3),
]


def make_trace(tokens=300, dim=64, kv_heads=2, group=2, queries=4, prompt=None, seed=0):
    """Random keys, values and queries; the queries come with the last tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    heads = kv_heads * group
    keys, values = randn(kv_heads, tokens, dim), randn(kv_heads, tokens, dim)
    space = Space(keys, randn(queries, heads, dim), randn(heads, 40, dim))
    asked = tuple(range(tokens - queries + 1, tokens + 1))
    return Trace(space, space, values, asked, prompt or asked[0] - 1, dim**-0.5)
