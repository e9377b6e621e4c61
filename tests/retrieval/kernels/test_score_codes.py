"""Scores of a batch's packed codes: by the kernel, by its definition, and request by request."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.codes import BLOCK, Codes
from retrieval.kernels.scan import quantized, scan_torch
from retrieval.kernels.score_codes import score_codes, score_codes_torch, score_codes_triton
from retrieval.kernels.scores import lse
from retrieval.kernels.tables import Tables, laid_out, rounded

CAPACITY = 20 * BLOCK  # more than one part, and no whole number of them
interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")
WAYS = [score_codes_torch, pytest.param(score_codes_triton, marks=interpreter)]


def request(hk, g, m, length, *, scaled=True, seed=0):
    """Random codes and a table of one request."""
    generator = torch.Generator().manual_seed(seed)
    codes = Codes(hk, m, scaled=scaled)
    codes.append(
        torch.randint(0, 16, (hk, length, m), dtype=torch.uint8, generator=generator),
        0.5 + torch.rand(hk, length, generator=generator) if scaled else None,
    )
    return codes, torch.randn(hk * g, m, 16, generator=generator)


def batched(requests, *, poison=255, scaled=True):
    """Their codes in slots; what is behind a length is poison."""
    hk, _, m, _ = requests[0][0].packed.shape
    packed = torch.full((len(requests), hk, CAPACITY // BLOCK, m, 16), poison, dtype=torch.uint8)
    scales = torch.full((len(requests), hk, CAPACITY), torch.nan, dtype=torch.float16)
    for slot, (codes, _) in enumerate(requests):
        packed[slot, :, : codes.packed.shape[1]] = codes.packed
        if scaled:
            scales[slot, :, : codes.length] = codes.scales
    lengths = torch.tensor([codes.length for codes, _ in requests], dtype=torch.int32)
    return packed, scales if scaled else None, lengths


def tables_of(requests, offset=None):
    heads = len(requests[0][0].packed)
    return rounded(torch.stack([table for _, table in requests]), heads, offset)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("g", "m"), [(1, 16), (2, 20), (3, 40), (4, 64), (8, 9), (12, 2)])
def test_scores_are_those_of_every_request_alone(way, g, m):
    requests = [request(1, g, m, length, seed=length) for length in (0, 1, 513, CAPACITY)]
    packed, scales, lengths = batched(requests)
    offset = torch.randn(len(requests), g, generator=torch.Generator().manual_seed(2))
    found = way(packed, scales, tables_of(requests, offset), lengths, 0.3)
    for slot, (codes, table) in enumerate(requests):
        want = scan_torch(codes, table) + offset[slot, :, None]
        raw = found.raw[slot]
        torch.testing.assert_close(raw[:, : codes.length], want, rtol=3e-7, atol=4e-7 * m)
        assert (raw[:, codes.length :] == -torch.inf).all()
        whole = torch.logsumexp(0.3 * want, -1)
        torch.testing.assert_close(lse(found)[slot], whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("m", [1, 7, 257])
def test_sums_are_the_same_integers(way, m):
    values = torch.randint(0, 256, (1, 4, m, 16), dtype=torch.uint8)
    values[0, 1] = 255  # the largest sums there are, beside others in the same word
    whole = Tables(laid_out(values, 1), torch.ones(1, 4), torch.zeros(1, 4), None)
    codes, _ = request(1, 4, m, 70, scaled=False)
    packed, scales, lengths = batched([(codes, None)], scaled=False)
    unpacked = torch.cat([codes.packed & 15, codes.packed >> 4], -1)[0].long()  # [blocks, M, 32]
    rows = unpacked.transpose(0, 1).flatten(1)[:, :70]  # [M, T]
    want = values[0].long().gather(2, rows.expand(4, -1, -1)).sum(1)
    raw = way(packed, scales, whole, lengths, 1.0).raw[0, :, :70]
    assert torch.equal(raw, want.float())
    assert (want[1] == 255 * m).all()


@interpreter
def test_query_heads_meet_the_codes_and_scales_of_their_own_kv_head():
    requests = [request(3, 2, 4, length, seed=length) for length in (90, 33)]
    packed, scales, lengths = batched(requests)
    found = score_codes_triton(packed, scales, tables_of(requests), lengths, 0.1)
    for slot, (codes, table) in enumerate(requests):
        want = scan_torch(codes, table)
        torch.testing.assert_close(found.raw[slot, :, : codes.length], want, rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_behind_a_length_is_read(way):
    requests = [request(1, 4, 8, length, seed=1) for length in (0, 31, 512)]
    tables = tables_of(requests)
    (packed, scales, lengths), (other, *_) = batched(requests), batched(requests, poison=0)
    found, again = (way(x, scales, tables, lengths, 0.1) for x in (packed, other))
    assert all(torch.equal(x, y) for x, y in zip(found, again))
    assert not any(x.isnan().any() for x in found)
    assert (found.total[0] == 0).all()
    assert (found.top[1, :, 1:] == -torch.inf).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_table_that_is_not_finite_spoils_its_own_head_only(way):
    codes, table = request(1, 4, 8, 40)
    table[2, 3, 5] = torch.nan
    packed, scales, lengths = batched([(codes, table)])
    found = way(packed, scales, tables_of([(codes, table)]), lengths, 0.1)
    spoilt = torch.tensor([False, False, True, False])
    assert torch.equal(found.raw[0, :, :40].isnan().all(-1), spoilt)
    assert torch.equal(found.raw[0, :, :40].isnan().any(-1), spoilt)
    assert torch.equal(lse(found)[0].isnan(), spoilt)


@interpreter
def test_the_kernel_and_its_definition_give_the_same_parts():
    requests = [request(1, 4, 16, length, seed=length) for length in (5, 600)]
    packed, scales, lengths = batched(requests)
    arguments = packed, scales, tables_of(requests), lengths, 0.2
    for got, want in zip(score_codes_triton(*arguments), score_codes_torch(*arguments)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert all(
        torch.equal(x, y) for x, y in zip(score_codes(*arguments), score_codes_torch(*arguments))
    )


def test_words_hold_the_bytes_of_a_group():
    values, _, _ = quantized(torch.randn(6, 5, 16))
    words = laid_out(values[None], 2)
    assert words.shape == (1, 2, 1, 5, 16, 4)
    assert torch.equal(words[0, 1, 0, :, :, 2], values[5].short())
    assert not words[..., 3].any()  # a head that the group does not have


def test_codes_that_do_not_fit_are_refused():
    codes, table = request(1, 1, 258, 3)
    packed, scales, lengths = batched([(codes, table)])
    with pytest.raises(ValueError, match="257"):
        score_codes(packed, scales, tables_of([(codes, table)]), lengths, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        score_codes(packed[:, :, ::2, :8], None, tables_of([(codes, table[:, :8])]), lengths, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize(("g", "m"), [(1, 64), (3, 40), (4, 64), (8, 128), (12, 20), (4, 257)])
def test_the_kernel_equals_its_definition_on_a_gpu(g, m):
    lengths = torch.tensor([0, 1, 4097, 20_000], dtype=torch.int32, device="cuda")
    packed = torch.randint(0, 256, (4, 2, 625, m, 16), dtype=torch.uint8, device="cuda")
    scales = torch.rand(4, 2, 20_000, device="cuda").half()
    tables = rounded(torch.randn(4, 2 * g, m, 16, device="cuda"), 2, torch.randn(4, 2 * g).cuda())
    arguments = packed, scales, tables, lengths, 0.1
    found, want = score_codes_triton(*arguments), score_codes_torch(*arguments)
    torch.testing.assert_close(found.raw, want.raw, rtol=1e-5, atol=1e-5 * m)
    torch.testing.assert_close(lse(found), lse(want), rtol=1e-5, atol=1e-4)
