"""Indexes of 4-bit codes, as requests bring them to a batch."""

import torch

from retrieval.scalar import ScalarIndex


def spread_keys(hk, d, count, *, seed=0, decay=1.0, dtype=torch.float32):
    """[hk, count, d] around a mean; with a decay, some directions vary much more than others."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.exp(-decay * torch.linspace(0, 5, d))
    turn = torch.linalg.qr(torch.randn(hk, d, d, generator=generator)).Q
    mean = 2 * torch.randn(hk, 1, d, generator=generator)
    keys = (torch.randn(hk, count, d, generator=generator) * widths) @ turn + mean
    return keys.to(dtype)


def scalar_index(hk, d, count, *, bits=2, seed=0, decay=1.0, dtype=torch.float32, **settings):
    """A finalized index of such keys."""
    index = ScalarIndex(hk, d, dtype, bits=bits, **settings)
    index.append(spread_keys(hk, d, count, seed=seed, decay=decay, dtype=dtype))
    index.finalize()
    return index
