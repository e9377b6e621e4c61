"""Keys rebuilt in hot buffers: each request as `LowRankKeys` and `Rope` make them."""

import pytest
import torch

from engine.kernels.rebuild import Angles, Factors, rebuild, rebuild_torch, rebuild_triton
from engine.model.rope import FarTable, Rope
from retrieval.lowrank import Gram, LowRankKeys
from tests.engine.kernels.rows import HEADS, layout_of, poisoned

LENGTHS = [0, 1, 127, 900]
ROPES = ["halves", "interleaved", "partial", "partial interleaved"]
KINDS = [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
BOTH = pytest.mark.parametrize("make", [rebuild_torch, rebuild_triton])


def rope_of(name, dim):
    half = dim // 8 if "partial" in name else dim // 2
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    return Rope(frequencies, scaling=1.25, interleaved="interleaved" in name)


def factors_of(heads, dim, rank, dtype, lengths):
    """Per-request keys, and the same for a batch: what no request has is not a number."""
    generator = torch.Generator().manual_seed(dim)
    made, most = [], max(lengths)
    coefficients = torch.full((len(lengths), most + 5, rank), torch.nan, dtype=dtype)
    basis = torch.full((len(lengths), heads, rank, dim), torch.nan)
    mean = torch.full((len(lengths), heads, dim), torch.nan)
    for b, length in enumerate(lengths):
        keys = torch.randn(heads, max(1, length), dim, generator=generator) + 0.5
        gram = Gram(heads, dim)
        gram.accumulate(keys)
        lowrank = LowRankKeys.from_gram(gram, rank=rank, dtype=dtype)
        lowrank.append(keys[:, :length])
        state = lowrank.state()
        coefficients[b, :length] = state["coords"]
        basis[b], mean[b] = state["basis"], state["mean"]
        made.append(lowrank)
    return made, Factors(coefficients, basis, mean)


def missing(lengths, heads, count):
    """Tokens in no order, then -1, and slots for them among `count` + 6."""
    generator = torch.Generator().manual_seed(count)
    tokens = torch.full((len(lengths), heads, count), -1, dtype=torch.int32)
    slots = torch.full_like(tokens, -1)
    for b, length in enumerate(lengths):
        for h in range(heads):
            some = torch.randperm(length, generator=generator)[: count - 3 * h]
            tokens[b, h, : len(some)] = some
            order = torch.randperm(count + 6, generator=generator)
            slots[b, h, : len(some)] = order[: len(some)]
    return tokens, slots


def case(heads, dim, rank, name, dtype, count=70, lengths=LENGTHS):
    made, factors = factors_of(heads, dim, rank, dtype, lengths)
    rope, layout = rope_of(name, dim), layout_of(dim, dtype)
    far = FarTable(rope, max(lengths))
    tokens, slots = missing(lengths, heads, count)
    hot = poisoned(len(lengths), heads, count + 6, layout)
    angles = Angles(far.near, far.far, rope.interleaved)
    given = (factors, tokens, slots, angles, hot, layout)
    return given, [(lowrank, rope, far) for lowrank in made]


def assert_rebuilt(given, requests, tolerance):
    """Every slot that was asked for holds its key; nothing else was written."""
    _, tokens, slots, _, hot, layout = given
    for b, (lowrank, rope, far) in enumerate(requests):
        for h in range(tokens.shape[1]):
            there = tokens[b, h] >= 0
            some, at = tokens[b, h][there].long(), slots[b, h][there].long()
            if len(some):
                keys = lowrank.rows(some.expand(tokens.shape[1], -1))[h]
                want = rope.rotate(keys[None], far.table(some))
                got = layout.decode(hot[b, h, at][None]).k
                torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
            assert (hot[b, h, at, layout.v_at :] == 255).all()
            others = torch.ones(hot.shape[2], dtype=torch.bool).index_fill_(0, at, False)
            assert (hot[b, h, others] == 255).all()


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ROPES)
def test_keys_are_those_of_the_request_at_their_positions(make, name, dtype, tolerance):
    given, requests = case(2, 64, 48, name, dtype, lengths=[0, 1, 600])
    make(*given)
    assert_rebuilt(given, requests, tolerance)


@BOTH
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("rank", [1, 20, 64])
def test_any_rank_and_head_size(make, dim, rank):
    for name in ("halves", "partial interleaved"):
        given, requests = case(3, dim, rank, name, torch.float32, 33, [0, 90])
        make(*given)
        assert_rebuilt(given, requests, 5e-6)


@BOTH
def test_tokens_may_stand_anywhere_and_slot_0_is_as_good_as_any(make):
    given, requests = case(2, 64, 20, "halves", torch.float32, 140, [300, 0, 40])
    _, tokens, slots, *_ = given
    tokens[0, :, :66], slots[0, :, :66] = -1, -1
    tokens[0, :, 70::2], slots[0, :, 70::2] = -1, -1
    slots[2, 0, :40] = torch.arange(40, dtype=torch.int32).flip(0)
    make(*given)
    assert_rebuilt(given, requests, 5e-6)


@pytest.mark.parametrize("name", ROPES)
def test_a_key_is_rounded_once(name):
    """At most half a step of its type off, which two roundings would not be."""
    given, requests = case(1, 64, 64, name, torch.float16, 200, [300])
    for make in (rebuild_torch, rebuild_triton):
        make(*given)
        got = given[-1].decode(given[4][0]).k
        lowrank, rope, far = requests[0]
        tokens, slots = given[1][0, 0].long(), given[2][0, 0].long()
        exact = rope.rotate(lowrank.rows(tokens[None]).double(), far.table(tokens))
        step = torch.finfo(torch.float16).eps * 2.0 ** exact.abs().clamp_min(0.25).log2().floor()
        off = (got[:, slots].double() - exact).abs() / step
        assert off.max() < 0.51


def test_on_a_cpu_the_definition_answers():
    given, requests = case(2, 64, 20, "halves", torch.bfloat16)
    rebuild(*given)
    assert_rebuilt(given, requests, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), KINDS, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ROPES)
def test_on_a_gpu_it_equals_the_requests(name, dtype, tolerance):
    for _, heads in HEADS:
        for dim, rank in ((64, 48), (80, 80), (128, 128)):
            given, requests = case(heads, dim, min(rank, heads * dim), name, dtype, 500)
            factors, tokens, slots, angles, hot, layout = given
            near, far = (type(t)(*(x.cuda() for x in t)) for t in angles[:2])
            there = hot.cuda()
            rebuild(
                Factors(*(x.cuda() for x in factors)),
                *(tokens.cuda(), slots.cuda(), Angles(near, far, angles.interleaved)),
                *(there, layout),
            )
            hot.copy_(there)
            assert_rebuilt(given, requests, 2 * tolerance)
