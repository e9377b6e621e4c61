"""Codes of a batch's newest keys: by the kernel, by its definition, and request by request."""

import pytest
import torch

from native.gpu import interpreted
from retrieval.codes import unpacked
from retrieval.device.scalar import DeviceScalar
from retrieval.kernels.encode import encode, encode_torch, encode_triton
from retrieval.scalar import encoded
from tests.retrieval.coded import scalar_index, spread_keys

interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on a CPU interpreted only")
WAYS = [encode_torch, pytest.param(encode_triton, marks=interpreter)]
CAPACITY = 96


def batch(hk, d, bits, slots=3):
    """Slots that divide their bits differently, all bytes of codes random."""
    indexes = [scalar_index(hk, d, 50, bits=bits, seed=slot, decay=slot) for slot in range(slots)]
    device = DeviceScalar(slots, hk, d, CAPACITY, bits=bits)
    for slot, index in enumerate(indexes):
        device.adopt(slot, index)
    packed, scales = device._codes.packed.clone(), device._codes.scales.clone()
    generator = torch.Generator().manual_seed(1)
    packed.random_(0, 256, generator=generator)
    scales.uniform_(generator=generator)
    return device._axes, packed, scales, indexes


def alone(index, key):
    """What the request's own index makes of one key: codes [Hk, M], scale [Hk]."""
    found = encoded(key[:, None].float() - index._mean, index._axes)
    return found.codes[:, 0], found.scales[:, 0]


def same_codes(got, want):
    """But for one that lies on an edge, up to the order of a sum."""
    assert (got != want).sum() <= 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("hk", "d", "bits", "dtype"),
    [
        (2, 64, 2, torch.float32),
        (1, 80, 1, torch.float16),
        (2, 80, 2, torch.bfloat16),
        (1, 128, 4, torch.float32),
        (1, 128, 2, torch.bfloat16),
        (1, 128, 1, torch.float32),
    ],
)
def test_a_key_has_the_codes_its_request_would_give_it(way, hk, d, bits, dtype):
    axes, packed, scales, indexes = batch(hk, d, bits)
    before, scales_before = unpacked(packed.flatten(0, 1)).clone(), scales.clone()
    keys = torch.stack(
        [spread_keys(hk, d, 1, seed=9, decay=slot, dtype=dtype)[:, 0] for slot in range(3)]
    )
    positions = [5, 31, 80]  # a low half, a high one, and another block's
    way(keys, torch.tensor(positions, dtype=torch.int32), axes, packed, scales)
    after = unpacked(packed.flatten(0, 1)).unflatten(0, (3, hk))
    before = before.unflatten(0, (3, hk))
    for slot, (index, at) in enumerate(zip(indexes, positions)):
        codes, scale = alone(index, keys[slot])
        same_codes(after[slot, :, at], codes)
        torch.testing.assert_close(scales[slot, :, at], scale, rtol=2e-3, atol=0)
        after[slot, :, at], scales[slot, :, at] = before[slot, :, at], scales_before[slot, :, at]
    assert torch.equal(after, before)  # and nothing else was touched
    assert torch.equal(scales, scales_before)


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_without_a_token_keeps_its_codes(way):
    axes, packed, scales, _ = batch(1, 64, 2)
    before, scales_before = packed.clone(), scales.clone()
    positions = torch.tensor([-1, CAPACITY, -7], dtype=torch.int32)
    way(torch.randn(3, 1, 64), positions, axes, packed, scales)
    assert torch.equal(packed, before)
    assert torch.equal(scales, scales_before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("way", WAYS)
def test_keys_that_say_nothing_score_as_the_mean_does(way):
    axes, packed, scales, indexes = batch(1, 64, 2, slots=5)
    keys = axes.mean.clone()  # slot 0: the mean itself
    keys[1, 0, 3], keys[2, 0, 3], keys[3] = torch.nan, torch.inf, 1e30
    keys[4] += 1e6  # far, but known
    way(keys, torch.full((5,), 40, dtype=torch.int32), axes, packed, scales)
    for slot, index in enumerate(indexes):
        codes, scale = alone(index, keys[slot])
        assert torch.equal(unpacked(packed[slot])[:, 40], codes)
        assert torch.equal(scales[slot, :, 40], scale)
    assert scales[:4, 0, 40].tolist() == [0] * 4
    assert scales[4, 0, 40] > 1000


def test_keys_on_a_cpu_take_the_definition():
    axes, packed, scales, _ = batch(1, 64, 2)
    keys, positions = torch.randn(3, 1, 64), torch.tensor([1, 2, 3], dtype=torch.int32)
    other, scales_other = packed.clone(), scales.clone()
    encode(keys, positions, axes, packed, scales)
    encode_torch(keys, positions, axes, other, scales_other)
    assert torch.equal(packed, other)
    assert torch.equal(scales, scales_other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hk", "d", "bits"), [(8, 128, 2), (2, 80, 1), (3, 64, 4)])
def test_the_kernel_equals_its_definition_on_a_gpu(hk, d, bits, dtype):
    axes, packed, scales, _ = batch(hk, d, bits)
    axes = type(axes)(*(x.cuda() for x in axes))
    keys = torch.randn(3, hk, d).to(dtype).cuda()
    positions = torch.tensor([0, 95, 48], dtype=torch.int32, device="cuda")
    found, want = ((packed.cuda(), scales.cuda()) for _ in range(2))
    encode_triton(keys, positions, axes, *found)
    encode_torch(keys, positions, axes, *want)
    same_codes(found[0], want[0])
    torch.testing.assert_close(found[1], want[1], rtol=2e-3, atol=0)
