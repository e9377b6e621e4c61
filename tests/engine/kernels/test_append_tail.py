"""New tokens in the summaries of a batch, as each request's own `Tail` takes them."""

import pytest
import torch

from engine.kernels.append_tail import append_tail, append_tail_torch, append_tail_triton
from retrieval.estimate import Tail

BOTH = pytest.mark.parametrize("append", [append_tail_torch, append_tail_triton])
CLUSTER = 8


def case(heads, dim, dtype, lengths):
    """Tails of requests, their summaries in a batch whose other rows are not numbers."""
    generator = torch.Generator().manual_seed(dim)
    tails = []
    rows = torch.full((len(lengths), heads, 7, 2 * dim + 16), torch.nan)
    summaries = rows[..., : 2 * dim + 1]
    for own, length in zip(summaries, lengths):
        tail = Tail(heads, dim, cluster_tokens=CLUSTER)
        if length > 0:
            tail.append(*torch.randn(2, heads, length, dim, generator=generator).to(dtype))
            own[:, : tail.summaries.shape[1]] = tail.summaries
        tails.append(tail)
    return tails, rows, summaries, generator


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 80), (3, 128)])
def test_a_batch_has_the_summaries_of_its_requests(append, heads, dim, dtype):
    lengths = [0, 1, 7, 8, 9, 30, -1]
    tails, rows, summaries, generator = case(heads, dim, dtype, lengths)
    for step in range(CLUSTER + 2):
        positions = torch.tensor([n + step if n >= 0 else -1 for n in lengths]).int()
        k, v = torch.randn(2, len(lengths), heads, dim, generator=generator).to(dtype)
        before = rows.clone()
        append(k, v, positions, summaries, CLUSTER)
        for b, (tail, length) in enumerate(zip(tails, lengths)):
            if length < 0:
                continue
            tail.append(k[b, :, None], v[b, :, None])
            held = summaries[b, :, : tail.summaries.shape[1]]
            torch.testing.assert_close(held, tail.summaries, rtol=1e-5, atol=1e-6)
            assert summaries[b, :, tail.summaries.shape[1] :].isnan().all()
        free = [b for b, length in enumerate(lengths) if length < 0]
        assert torch.equal(rows[free].isnan(), before[free].isnan())  # nothing of a free slot
    assert rows[..., 2 * dim + 1 :].isnan().all()


def test_tensors_of_a_cpu_go_to_the_definition():
    _, _, summaries, generator = case(2, 64, torch.float32, [3, 9])
    k, v = torch.randn(2, 2, 2, 64, generator=generator)
    positions, want = torch.tensor([3, 9]).int(), summaries.clone()
    append_tail(k, v, positions, summaries, CLUSTER)
    append_tail_torch(k, v, positions, want, CLUSTER)
    torch.testing.assert_close(summaries, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_equals_its_definition(dtype):
    lengths = [0, 5, 30, -1]
    _, _, want, generator = case(8, 128, dtype, lengths)
    there = want.cuda()
    for step in range(CLUSTER + 2):
        positions = torch.tensor([n + step if n >= 0 else -1 for n in lengths]).int()
        k, v = torch.randn(2, len(lengths), 8, 128, generator=generator).to(dtype)
        append_tail_torch(k, v, positions, want, CLUSTER)
        append_tail(k.cuda(), v.cuda(), positions.cuda(), there, CLUSTER)
        torch.testing.assert_close(there.cpu(), want, rtol=1e-5, atol=1e-6, equal_nan=True)
