"""Byte tables of a batch of queries: by the kernel, by its definition, and request by request."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.device.scalar import DeviceScalar
from retrieval.kernels.scan import quantized
from retrieval.kernels.tables import laid_out, lanes, rounded, tables, tables_torch, tables_triton
from tests.retrieval.coded import scalar_index

interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")
WAYS = [tables_torch, pytest.param(tables_triton, marks=interpreter)]


def batch(hk, d, bits):
    """A batch whose slots divide their bits differently, and the requests' own indexes."""
    found = [scalar_index(hk, d, 50, bits=bits, seed=seed, decay=seed) for seed in range(2)]
    device = DeviceScalar(3, hk, d, 64, bits=bits)
    for slot, index in enumerate(found):
        device.adopt(slot, index)
    return device, found


def bytes_of(found, slot, group):
    """[Hq, M, 16]"""
    values = found.words[slot].permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :group]
    return values.flatten(0, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("hk", "g", "d", "bits"),
    [(2, 4, 64, 2), (1, 1, 80, 1), (1, 3, 80, 2), (1, 8, 128, 4), (1, 2, 128, 2), (1, 4, 128, 1)],
)
def test_tables_are_those_of_every_request_alone(way, hk, g, d, bits):
    device, indexes = batch(hk, d, bits)
    query = torch.randn(3, hk * g, d, generator=torch.Generator().manual_seed(9))
    found = way(query, device._axes)
    assert found.words.shape[2:] == (lanes(g)[0], d * bits // 4, 16, lanes(g)[1])
    for slot, index in enumerate(indexes):
        values, step, bias = quantized(index._table(query[slot]))
        near = (bytes_of(found, slot, g) - values.short()).abs()
        assert near.max() <= 1  # where a sum in another order falls on the other side of a half
        assert near.float().mean() <= 1e-3
        torch.testing.assert_close(found.step[slot], step, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.bias[slot], bias, rtol=1e-4, atol=1e-3)
        want = query[slot].unflatten(0, (hk, g)) @ index.state()["mean"].mT
        torch.testing.assert_close(found.offset[slot], want.flatten(), rtol=1e-5, atol=1e-4)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_of_low_precision_are_widened_first(dtype):
    device, _ = batch(1, 64, 2)
    query = torch.randn(3, 3, 64).to(dtype)
    for got, want in zip(
        tables_triton(query, device._axes), tables_torch(query.float(), device._axes)
    ):
        torch.testing.assert_close(
            got.float(), want.float(), rtol=1e-5, atol=1.0 if got.dtype == torch.int16 else 1e-4
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_that_is_free_has_tables_of_zeros(way):
    device, _ = batch(1, 64, 2)
    found = way(torch.randn(3, 4, 64), device._axes)
    assert not found.words[2].any()
    assert not found.step[2].any()
    assert not found.bias[2].any()
    assert not found.offset[2].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("way", WAYS)
def test_a_query_that_is_not_finite_spoils_its_own_head_only(way):
    device, _ = batch(1, 64, 2)
    query = torch.randn(3, 4, 64)
    query[0, 2, 5] = torch.nan
    query[1, 0, 7] = torch.inf
    found = way(query, device._axes)
    finite = found.step.isfinite() & found.bias.isfinite()
    want = torch.ones(3, 4, dtype=torch.bool)
    want[0, 2] = want[1, 0] = False
    assert torch.equal(finite, want)


@pytest.mark.parametrize("way", WAYS)
def test_a_query_of_zeros_has_bytes_of_zero(way):
    device, _ = batch(1, 64, 2)
    found = way(torch.zeros(3, 2, 64), device._axes)
    assert not found.words.any()
    assert not found.step.any()


def test_rounded_is_quantized_for_every_slot():
    table = torch.randn(2, 6, 5, 16)
    found = rounded(table, 2)
    values, step, bias = quantized(table[1])
    assert torch.equal(found.words[1], laid_out(values[None], 2)[0])
    assert torch.equal(found.step[1], step)
    assert torch.equal(found.bias[1], bias)
    assert found.offset is None


def test_queries_on_a_cpu_take_the_definition():
    device, _ = batch(1, 64, 2)
    query = torch.randn(3, 4, 64)
    got, want = tables(query, device._axes), tables_torch(query, device._axes)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hk", "g", "d", "bits"), [(2, 4, 128, 2), (2, 3, 80, 1), (1, 8, 64, 4)])
def test_the_kernel_equals_its_definition_on_a_gpu(hk, g, d, bits, dtype):
    device, _ = batch(hk, d, bits)
    axes = type(device._axes)(*(x.cuda() for x in device._axes))
    query = torch.randn(3, hk * g, d).to(dtype).cuda()
    found, want = tables_triton(query, axes), tables_torch(query, axes)
    near = (found.words - want.words).abs()
    assert near.max() <= 1
    assert near.float().mean() <= 1e-3
    for got, wanted in zip(found[1:], want[1:]):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
