"""Lossless is lossless, smaller, and never misled by what it reads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs.codec import byte_view
from kvstore.codecs.known import LOSSLESS, RAW
from kvstore.errors import CorruptRecord
from kvstore.identity import DTYPES
from tests.kvstore.make import same

DTYPE = st.sampled_from(list(DTYPES.values()))


def there_and_back(data, codec=LOSSLESS):
    payload = codec.encode(data)
    out = torch.empty_like(data)
    landed = codec.landing(byte_view(out), out.shape, out.dtype, payload.nbytes)
    landed[:] = payload
    codec.decode(landed, out)
    return out, payload.nbytes


def like_kv(shape, dtype, seed=0):
    """Numbers of about one size, as KV has them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(
    st.tuples(
        st.integers(1, 3), st.just(2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)
    ),
    DTYPE,
    st.sampled_from(["noise", "numbers", "zeros", "special"]),
    st.integers(0, 1000),
)
def test_every_bit_comes_back(shape, dtype, what, seed):
    data = like_kv(shape, dtype, seed)
    if what == "noise":
        rng = np.random.default_rng(seed)
        data = torch.from_numpy(rng.integers(0, 256, data.nbytes, np.uint8)).view(dtype).view(shape)
    elif what == "zeros":
        data.zero_()
    elif what == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny])
        data.view(-1)[: len(special)] = special.to(dtype)[: data.numel()]
    out, nbytes = there_and_back(data)
    assert same(out, data)
    assert nbytes <= LOSSLESS.payload_bytes(data.shape, dtype)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.7), (torch.float16, 0.9), (torch.float32, 0.85)]
)
def test_numbers_of_about_one_size_take_less(dtype, share):
    data = like_kv((2, 2, 2, 64, 64), dtype)
    assert there_and_back(data)[1] < share * there_and_back(data, RAW)[1]


def test_noise_takes_eight_bytes_a_plane_more():
    rng = np.random.default_rng(0)
    data = (
        torch.from_numpy(rng.integers(0, 256, 4096, np.uint8))
        .view(1, 2, 1, 16, 128)
        .view(torch.bfloat16)
    )
    assert (
        there_and_back(data)[1]
        == data.nbytes + 16
        == LOSSLESS.payload_bytes(data.shape, data.dtype)
    )


@given(st.data())
def test_whatever_is_decoded_is_numbers_or_a_clear_error(draw):
    """Behind a right checksum nothing else can be; if it is, it is a miss."""
    data = like_kv((1, 2, 1, 8, 64), torch.bfloat16)
    bad = LOSSLESS.encode(data).copy()
    for _ in range(draw.draw(st.integers(1, 4))):
        bad[draw.draw(st.integers(0, len(bad) - 1) | st.integers(0, 40))] = draw.draw(
            st.integers(0, 255)
        )
    cut = draw.draw(st.sampled_from([0, 0, 1, 17]))
    bad = bad[: len(bad) - cut]
    out = torch.empty_like(data)
    try:
        LOSSLESS.decode(bad, out)
    except CorruptRecord:
        return


@pytest.mark.parametrize("nbytes", [0, 15, 1 << 40])
def test_a_size_that_cannot_be_takes_no_memory(nbytes):
    data = like_kv((1, 2, 1, 8, 64), torch.bfloat16)
    for codec in (LOSSLESS, RAW):
        with pytest.raises(CorruptRecord, match=r"payload of \d+ bytes for"):
            codec.landing(byte_view(data), data.shape, data.dtype, nbytes)


def test_a_plane_that_claims_to_be_larger_than_the_numbers_is_refused():
    small, large = (like_kv((1, 2, 1, p, 64), torch.bfloat16) for p in (8, 16))
    with pytest.raises(CorruptRecord, match="a plane is not of 1024 bytes"):
        LOSSLESS.decode(LOSSLESS.encode(large.zero_()), small)
