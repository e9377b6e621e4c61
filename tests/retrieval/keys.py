"""Keys and queries as a model could make them, their rotation, and prompts cut into appends."""

import torch

SHAPES = [(1, 1, 64), (2, 7, 64), (4, 1, 80), (1, 8, 128), (2, 4, 128)]  # Hk, G, D: MHA, MQA, GQA
LENGTHS = [1, 127, 300]
DTYPES = [torch.float32, torch.bfloat16]


def make_keys(heads, count, dim, dtype=torch.float32, seed=0):
    """[heads, count, dim]: a common offset, neighbours that are alike, and some strangers."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(heads, count, dim, generator=generator)
    drift = torch.randn(heads, count // 20 + 1, dim, generator=generator).repeat_interleave(20, 1)
    offset = 2 * torch.randn(heads, 1, dim, generator=generator)
    strangers = torch.rand(heads, count, 1, generator=generator) < 0.02
    keys = offset + drift[:, :count] + 0.5 * noise
    return torch.where(strangers, 3 * noise, keys).to(dtype)


def make_query(heads, dim, dtype=torch.float32, seed=1):
    """[heads, dim]"""
    return torch.randn(heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def selected_ids(heads, count, length, seed=0):
    """[heads, count] of tokens, ascending."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randperm(length, generator=generator)[:count] for _ in range(heads)]
    return torch.stack(picks).sort(-1).values


def others(ids, length):
    """[heads, length - count] of tokens that are not selected, ascending."""
    every = torch.ones(len(ids), length, dtype=torch.bool).scatter_(1, ids, False)
    return every.nonzero()[:, 1].view(len(ids), -1)


def plain_scores(query, keys):
    """q · k by definition, in double precision: [Hq, T]."""
    group = len(query) // len(keys)
    return torch.einsum("hd,htd->ht", query.double(), keys.double().repeat_interleave(group, 0))


def rotate(x, positions, base=10_000.0):
    """RoPE with complex numbers: token t of every head at positions[t]."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * frequency
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def turn_by(delta):
    """What `relocate` takes: rotates any rows by `delta` positions."""
    return lambda rows: rotate(rows, [delta] * rows.shape[1])


def fill(index, keys, cuts, prompt):
    """Append `keys` in pieces that end at `cuts`; finalize when the first `prompt` are in."""
    ends = sorted({*cuts, prompt, keys.shape[1]} - {0})
    for start, stop in zip([0, *ends], ends):
        if start == prompt:
            index.finalize()
        index.append(keys[:, start:stop])
    if prompt == keys.shape[1]:
        index.finalize()
    return index


def through_bytes(state):
    """A state as it comes back from a disk: equal tensors, other memory."""
    return {name: tensor.clone() for name, tensor in state.items()}
