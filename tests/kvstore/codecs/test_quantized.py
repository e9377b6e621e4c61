"""Lossy codecs: sizes to the byte, errors within their bounds, for whatever KV there may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.codec import byte_view
from kvstore.codecs.known import FOUR_BITS, LOSSY
from kvstore.codecs.parts import Channels, Heads, Part, Smoothed
from kvstore.codecs.quantized import Quantized
from kvstore.errors import CorruptRecord
from kvstore.identity import DTYPES
from kvstore.rows import Int4

CODECS = list(LOSSY.values())
PARTS = {"fp8": Heads(), "int8": Channels(), "int4": FOUR_BITS}
SHAPES = st.tuples(
    st.integers(1, 3), st.just(2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 130)
)
KINDS = {
    "numbers": lambda x: x,
    "zeros": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, -3.25),
    "outlier channel": lambda x: x + 1000 * (torch.arange(x.shape[-1]) == 0),
    "outlier number": lambda x: x.index_fill(-1, torch.tensor(0), 3e4),
    "tiny": lambda x: x * 1e-7,
}


def made(shape, dtype, kind="numbers", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return KINDS[kind](x).to(dtype)


def there_and_back(part, x):
    data = part.encode(x)
    assert data.shape == (*x.shape[:-3], part.nbytes(*x.shape[-3:]))
    out = torch.full_like(x, torch.nan)
    part.decode(data, out)
    return out


def spread(x):
    """Half of what lies between the least and the largest number of a channel."""
    wide = x.float()
    return (wide.amax(-2, keepdim=True) - wide.amin(-2, keepdim=True)) / 2


def bounds(x):
    """The most by which a number may be off, by codec; bf16 has 8 bits, and rounds what it gets."""
    wide, half = x.float().abs(), spread(x)
    off = wide.amax(-2, keepdim=True) * 2**-8  # of the middle; the step is wider by as much
    ours = wide * torch.finfo(x.dtype).eps + torch.finfo(x.dtype).smallest_normal
    return {
        "fp8": wide / 16 + wide.amax((-2, -1), keepdim=True) / 448 / 512 + ours,
        "int8": (half + off) / 127 * 0.51 + ours,
        "int4": (half + off) / 15 * 1.03 + (half + off) * 2**-9 + ours,
    }


@settings(max_examples=60)
@given(
    SHAPES, st.sampled_from(list(DTYPES.values())), st.sampled_from(list(KINDS)), st.integers(0, 99)
)
def test_no_number_is_further_off_than_its_codec_allows(shape, dtype, kind, seed):
    x = made(shape, dtype, kind, seed)[:, 0]
    for name, bound in bounds(x).items():
        off = (there_and_back(PARTS[name], x).float() - x.float()).abs()
        assert (off <= bound).all(), (name, (off - bound).max(), off.max())


@settings(max_examples=40)
@given(SHAPES, st.sampled_from(list(DTYPES.values())), st.sampled_from(CODECS))
def test_payloads_have_one_size_and_layers_are_alone(shape, dtype, codec):
    data = made(shape, dtype)
    payload = codec.encode(data)
    assert payload.nbytes == codec.payload_bytes(data.shape, dtype)
    alone = [codec.encode(layer).tobytes() for layer in data.split(1)]
    assert payload.tobytes() == b"".join(alone)
    out = torch.full_like(data, torch.nan)
    codec.decode(payload, out)
    for layer, part in zip(out, alone):
        one = torch.empty_like(layer[None])
        codec.decode(torch.frombuffer(bytearray(part), dtype=torch.uint8).numpy(), one)
        assert torch.equal(one[0], layer)


def test_sizes_to_the_byte():
    """Of 64 tokens of 8 KV heads x 128 in two layers: 512 KiB as they are."""
    shape = torch.Size((2, 2, 8, 64, 128))
    sizes = {codec.name: codec.payload_bytes(shape, torch.bfloat16) for codec in CODECS}
    numbers, channels, heads = shape.numel(), 2 * 2 * 8 * 128, 2 * 2 * 8
    rows = heads * 64 * (64 + 2 * 4)  # 128 codes of 4 bits, and two groups' scale and least
    four, eight = rows + 4 * channels, numbers + 4 * channels
    assert sizes == {
        "fp8": numbers + 4 * heads, "int8": eight, "k8v4": eight // 2 + four // 2, "int4": four,
    }  # fmt: skip
    assert sizes == {"fp8": 262272, "int8": 278528, "k8v4": 221184, "int4": 163840}


@pytest.mark.parametrize("kind", ["zeros", "constant"])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_zeros_and_constants_come_back_as_they_are(codec, kind):
    data = made((2, 2, 2, 5, 33), torch.float16, kind)
    out = torch.full_like(data, torch.nan)
    codec.decode(codec.encode(data), out)
    assert torch.equal(out, data) or (codec.name == "fp8" and (out - data).abs().max() < 1e-2)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_numbers_that_are_none_are_not_encoded(codec, number):
    for at in ((0, 0, 0, 0, 0), (1, 1, 1, 4, 32)):
        data = made((2, 2, 2, 5, 33), torch.bfloat16)
        data[at] = number
        assert codec.encode(data) is None


def test_the_largest_numbers_are_encoded_or_refused():
    for dtype in DTYPES.values():
        data = made((1, 2, 1, 6, 8), dtype)
        data[..., 2, :] = torch.finfo(dtype).max
        data[..., 3, :4] = -torch.finfo(dtype).max
        for codec in CODECS:
            payload = codec.encode(data)
            if payload is not None:
                out = torch.empty_like(data)
                codec.decode(payload, out)
                assert out.isfinite().all(), (codec.name, dtype)


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c.name)
def test_a_payload_of_any_other_size_takes_no_memory(codec):
    data = made((1, 2, 1, 8, 64), torch.bfloat16)
    right = codec.payload_bytes(data.shape, data.dtype)
    assert codec.landing(byte_view(data), data.shape, data.dtype, right).nbytes == right
    for nbytes in (0, right - 1, right + 1, 1 << 50):
        with pytest.raises(CorruptRecord, match=f"{codec.name} payload of {nbytes} bytes"):
            codec.landing(byte_view(data), data.shape, data.dtype, nbytes)


@settings(max_examples=30)
@given(st.sampled_from(CODECS), st.integers(0, 2**32 - 1))
def test_any_bytes_of_the_right_size_are_decoded(codec, seed):
    """Behind a right checksum there is nothing else than what was encoded; and if there were."""
    out = made((2, 2, 3, 9, 35), torch.bfloat16)
    noise = torch.randint(
        0, 256, (codec.payload_bytes(out.shape, out.dtype),), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    codec.decode(noise.numpy(), out)


def test_smoothing_helps_where_channels_differ_and_takes_no_more_bytes():
    x = made((2, 2, 2, 64, 128), torch.bfloat16)[:, 0]
    size = torch.linspace(-2, 2, 128).exp()[torch.randperm(128)]
    x = (x * size + 3 * size).to(torch.bfloat16)
    plain = Int4(group=32)
    assert 2 * 64 * plain.row_bytes(128) == FOUR_BITS.nbytes(2, 64, 128)
    without = (plain.decode(plain.encode(x), 128, torch.float32) - x.float()).norm()
    assert (there_and_back(FOUR_BITS, x).float() - x.float()).norm() < 0.6 * without


def test_parts_are_parts():
    assert all(isinstance(part, Part) for part in (Channels(), Heads(), Smoothed(Int4())))
    assert all(isinstance(codec, Quantized) for codec in CODECS)
