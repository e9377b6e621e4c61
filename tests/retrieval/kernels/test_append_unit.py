"""New keys in the rows of a batch, as each request's own index makes them of its units."""

import pytest
import torch

from retrieval.kernels.append_unit import append_unit, append_unit_torch, append_unit_triton
from retrieval.landmarks import means
from retrieval.quest import bounds

BOTH = pytest.mark.parametrize("append", [append_unit_torch, append_unit_triton])
SIZES = {"mean": 8, "bounds": 16, "key": 1}
START = [0, 1, 7, 30, -1]
STEPS = 18
CLOSE = {
    torch.float32: dict(rtol=1e-5, atol=1e-6),
    torch.float16: dict(rtol=1e-3, atol=1e-5),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-5),
}


def case(form, heads, dim, dtype):
    """Keys of every slot, and room for its rows that holds no numbers."""
    generator = torch.Generator().manual_seed(dim)
    keys = torch.randn(len(START), heads, max(START) + STEPS, dim, generator=generator).to(dtype)
    size, width = SIZES[form], 2 if form == "bounds" else 1
    waiting = torch.full((len(START), heads, size, dim), torch.nan, dtype=dtype)
    rows = torch.full((len(START), heads, 60 // size, width * dim), torch.nan, dtype=dtype)
    for own, k, start in zip(waiting, keys, START):
        own[:, : max(start, 0) % size] = k[:, max(start, 0) // size * size : max(start, 0)]
    return keys, waiting, rows


def walk(append, form, keys, waiting, rows):
    for step in range(STEPS):
        positions = torch.tensor([start + step if start >= 0 else -1 for start in START])
        newest = keys[torch.arange(len(START)), :, positions.clamp_min(0)]
        append(newest.to(rows.device), positions.int().to(rows.device), waiting, rows, form)


def summary(form, keys):
    """Of the keys of one unit [Hk, n, D], by what a request's index has for full ones."""
    if form == "key":
        return keys[:, 0]
    make = means if form == "mean" else bounds
    return make(keys[:, None])[:, 0]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 80)])
@pytest.mark.parametrize("form", SIZES)
def test_rows_are_those_of_the_requests(append, form, heads, dim, dtype):
    keys, waiting, rows = case(form, heads, dim, dtype)
    walk(append, form, keys, waiting, rows)
    size, close = SIZES[form], dict(rtol=0, atol=0)
    if append is append_unit_triton and form == "mean":  # summed in another order, rounded once
        close = CLOSE[dtype]
    for own, k, start in zip(rows, keys, START):
        if start < 0:
            assert own.isnan().all()
            continue
        first, stop = start // size, -(-(start + STEPS) // size)
        assert own[:, :first].isnan().all()
        assert own[:, stop:].isnan().all()
        for unit in range(first, stop):
            want = summary(form, k[:, unit * size : min((unit + 1) * size, start + STEPS)])
            torch.testing.assert_close(own[:, unit], want, **close)


def test_what_is_no_number_stays_so_in_bounds():
    keys, waiting, rows = case("bounds", 1, 64, torch.float32)
    keys[:, :, 1, 3] = torch.nan
    own = waiting.clone(), rows.clone()
    walk(append_unit_torch, "bounds", keys, *own)
    walk(append_unit_triton, "bounds", keys, waiting, rows)
    torch.testing.assert_close((waiting, rows), own, rtol=0, atol=0, equal_nan=True)
    assert rows[0, 0, 0, 3].isnan()
    assert not rows[0, 0, 0, 4].isnan()


def test_tensors_of_a_cpu_go_to_the_definition():
    keys, *ours = case("mean", 2, 64, torch.float32)
    theirs = [x.clone() for x in ours]
    walk(append_unit, "mean", keys, *ours)
    walk(append_unit_torch, "mean", keys, *theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", SIZES)
def test_on_a_gpu_it_equals_its_definition(form, dtype):
    keys, *want = case(form, 8, 128, dtype)
    got = [x.cuda() for x in want]
    walk(append_unit_torch, form, keys, *want)
    walk(append_unit, form, keys, *got)
    torch.testing.assert_close([x.cpu() for x in got], want, equal_nan=True, **CLOSE[dtype])
