"""Rows of K and V: exact where nothing is saved, half a step off where something is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.rows import CODECS, Int4, Int8, PoolShape, Raw, RowLayout, row_codec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DIMS = [64, 80, 128]


def numbers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def there_and_back(codec, x, dtype=torch.float32):
    return codec.decode(codec.encode(x), x.shape[-1], dtype)


def int4_bound(x, group=32):
    """Half a step of each number's group, and what fp16 does to the scale and least value."""
    bound = torch.empty_like(x)
    for lo in range(0, x.shape[-1], group):
        part = x[..., lo : lo + group]
        least = part.amin(-1, keepdim=True)
        step = (part.amax(-1, keepdim=True) - least) / 15
        bound[..., lo : lo + group] = step / 2 * 1.02 + least.abs() * 2**-11 + 2e-6
    return bound


def int8_bound(x):
    return (x.abs().amax(-1, keepdim=True) / 127 / 2 * 1.0001).expand_as(x)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dim", [1, 7, *DIMS])
def test_rows_have_the_size_they_say_and_any_leading_shape(name, dim):
    codec = row_codec(name)
    assert codec.name == name
    for shape in ((dim,), (3, dim), (2, 5, dim), (2, 0, dim)):
        rows = codec.encode(numbers(*shape))
        assert rows.shape == (*shape[:-1], codec.row_bytes(dim))
        assert codec.decode(rows, dim, torch.float32).shape == shape


def test_the_sizes_are_those_of_the_formats():
    assert [Raw(torch.bfloat16).row_bytes(d) for d in DIMS] == [128, 160, 256]
    assert [Int8().row_bytes(d) for d in DIMS] == [68, 84, 132]
    assert [Int4().row_bytes(d) for d in DIMS] == [40, 52, 80]
    assert Int4(group=16).row_bytes(64) == 48


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_rows_give_back_every_bit(dtype):
    x = numbers(2, 9, 80, dtype=dtype)
    x[0, 0, :3] = torch.tensor([torch.inf, -0.0, torch.nan])
    back = there_and_back(Raw(dtype), x, dtype)
    assert torch.equal(back.contiguous().view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_low_precision_is_at_most_half_a_step_off(dtype, dim, offset):
    x = (3 * numbers(4, 50, dim) + offset).to(dtype)
    wide = x.float()
    assert ((there_and_back(Int8(), x) - wide).abs() <= int8_bound(wide)).all()
    assert ((there_and_back(Int4(), x) - wide).abs() <= int4_bound(wide)).all()
    small = Int4(group=16)
    assert ((there_and_back(small, x) - wide).abs() <= int4_bound(wide, 16)).all()


FLOATS = st.floats(-3e4, 3e4, width=32)


@settings(max_examples=150)
@given(st.lists(FLOATS, min_size=1, max_size=80))
def test_any_finite_row_stays_finite_and_within_its_bound(values):
    x = torch.tensor([values], dtype=torch.float32)
    for codec, bound in ((Int8(), int8_bound(x)), (Int4(), int4_bound(x))):
        back = there_and_back(codec, x)
        assert back.isfinite().all()
        assert ((back - x).abs() <= bound + 1e-30).all(), codec.name


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=lambda c: c.name)
def test_rows_of_zeros_are_zeros_and_constant_rows_constant(codec):
    assert not there_and_back(codec, torch.zeros(3, 80)).any()
    for value in (2.5, -1e-3, 3e4):
        x = torch.full((1, 80), value).bfloat16()
        back = there_and_back(codec, x)
        assert (back == back[0, 0]).all()
        torch.testing.assert_close(back, x.float(), rtol=1e-3, atol=1e-6)


def test_a_group_that_ends_early_does_not_see_beyond_itself():
    x = torch.full((1, 80), 5.0)
    x[:, 64:] = torch.linspace(7, 8, 16)
    assert ((there_and_back(Int4(), x) - x).abs() <= int4_bound(x)).all()


def test_a_row_does_not_depend_on_its_neighbours():
    x = numbers(3, 40, 80)
    for codec in (Raw(torch.float32), Int8(), Int4()):
        rows = codec.encode(x)
        assert torch.equal(rows[1, 17], codec.encode(x[1, 17]))
        picked = codec.decode(rows[:, 5:6], 80, torch.float32)
        assert torch.equal(picked, codec.decode(rows, 80, torch.float32)[:, 5:6])


KEYS = [None, "bfloat16", "int8", "int4"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["bfloat16", "float32", "int8", "int4"])
@pytest.mark.parametrize("dim", DIMS)
def test_a_layout_puts_k_and_v_side_by_side(key, value, dim):
    kc, vc = key and row_codec(key), row_codec(value)
    layout = RowLayout(kc, vc, dim, torch.float32)
    k, v = numbers(2, 11, dim), numbers(2, 11, dim, seed=1)
    rows = layout.encode(k if key else None, v)
    assert rows.shape == (2, 11, layout.row_bytes)
    assert layout.row_bytes % 16 == 0
    back = layout.decode(rows)
    assert torch.equal(back.v, there_and_back(vc, v))
    assert (back.k is None) if key is None else torch.equal(back.k, there_and_back(kc, k))
    end = layout.v_at + vc.row_bytes(dim)
    assert torch.equal(rows[..., layout.v_at : end], vc.encode(v))
    assert end <= layout.row_bytes < end + 16


def test_nothing_that_lay_in_memory_gets_into_a_row(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(0xAA))
    for codec in (Int8(), Int4(), Raw(torch.bfloat16)):
        layout = RowLayout(codec, codec, 7, torch.float32)
        rows = layout.encode(torch.zeros(1, 2, 7), torch.zeros(1, 2, 7))
        assert not (rows == 0xAA).any()


def test_a_layout_with_keys_asks_for_them():
    layout = RowLayout(Raw(torch.float32), Int4(), 64, torch.float32)
    with pytest.raises(ValueError, match="rows hold keys"):
        layout.encode(None, numbers(1, 2, 64))
    with pytest.raises(ValueError, match="head_dim"):
        RowLayout(None, Int4(), 0, torch.float32)


def test_raw_rows_decode_without_a_copy():
    codec = Raw(torch.bfloat16)
    layout = RowLayout(codec, codec, 64, torch.bfloat16)
    x = numbers(2, 3, 64, dtype=torch.bfloat16)
    rows = layout.encode(x, x)
    assert layout.decode(rows).v.untyped_storage().data_ptr() == rows.data_ptr()


def test_an_unknown_codec_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no row codec 'int3'; there are bfloat16, .*int4"):
        row_codec("int3")


def test_the_shape_of_a_pool_counts_its_bytes_and_refuses_what_it_cannot_be():
    layout = RowLayout(Raw(torch.bfloat16), Raw(torch.bfloat16), 128, torch.bfloat16)
    shape = PoolShape(32, 8, layout)
    assert (shape.layer_bytes, shape.block_bytes) == (256 << 10, 8 << 20)
    for wrong in ((0, 8, 64), (32, 0, 64), (32, 8, 48), (32, 8, 0)):
        with pytest.raises(ValueError):
            PoolShape(*wrong[:2], layout, wrong[2])
