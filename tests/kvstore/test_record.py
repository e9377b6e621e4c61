"""Records: what goes in comes out, and one flipped bit anywhere is seen."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import record
from kvstore.block import KVBlock, Precision
from kvstore.codecs.codec import DTYPE_CODES, Codec
from kvstore.codecs.known import BY_NAME, CODECS, LOSSLESS, RAW
from kvstore.disk.entry import Entry, unpack
from kvstore.disk.tier import DiskTier
from kvstore.disk.values import PAGE_BYTES
from kvstore.errors import CorruptRecord
from kvstore.identity import DTYPES
from tests.kvstore.make import chain, content, identity, right, same
from tests.kvstore.stored import change_record

MODEL = identity()
KEY = chain(range(4))[0]
DATA = content(KEY, MODEL)
LAYERS = range(3)


@pytest.fixture(params=BY_NAME)
def codec(request):
    return BY_NAME[request.param]


def key_for(codec):
    return chain(range(4), precision=codec.precision)[0]


def encoded(codec=RAW):
    data = DATA if codec.precision is Precision.EXACT else torch.randn(DATA.shape).to(DATA.dtype)
    return bytearray(record.encode(key_for(codec), data, LAYERS, 3, codec))


def decode(data, key=KEY, layers=LAYERS, num_layers=3, like=DATA):
    out = torch.empty_like(like)
    record.decode_into(out, memoryview(data), key, layers, num_layers)
    return out


SHAPES = st.tuples(
    st.integers(1, 3), st.just(2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)
)


@given(SHAPES, st.sampled_from(list(DTYPES.values())), st.integers(0, 2), st.integers(0, 2),
       st.sampled_from([RAW, LOSSLESS]))  # fmt: skip
def test_every_dtype_and_shape_comes_back(shape, dtype, before, after, codec):
    data = torch.randn(shape).to(dtype)
    layers = range(before, before + shape[0])
    made = record.encode(KEY, data, layers, layers.stop + after, codec)
    out = decode(made, layers=layers, num_layers=layers.stop + after, like=data)
    assert same(out, data)


def test_a_header_fits_a_page():
    assert record.HEADER_BYTES == 176 <= PAGE_BYTES


def test_codes_on_disk_are_those_of_version_2():
    assert {str(dtype): code for dtype, code in DTYPE_CODES.items()} == {
        "torch.bfloat16": 1, "torch.float16": 2, "torch.float32": 3,
    }  # fmt: skip
    assert {code: codec.name for code, codec in CODECS.items()} == {
        1: "raw", 2: "lossless", 3: "fp8", 4: "int8", 5: "k8v4", 6: "int4",
    }  # fmt: skip
    assert {precision.name: int(precision) for precision in Precision} == {
        "EXACT": 0, "FP8": 1, "INT8": 2, "K8V4": 3, "INT4": 4,
    }  # fmt: skip
    assert all(isinstance(codec, Codec) for codec in CODECS.values())


@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_anywhere_is_seen(bit, codec):
    good, key = encoded(codec), key_for(codec)
    decode(good, key)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= bit
        with pytest.raises(CorruptRecord):
            decode(bad, key)


def test_a_record_of_any_other_length_is_seen(codec):
    good, key = encoded(codec), key_for(codec)
    for length in [*range(record.HEADER_BYTES + 2), len(good) - 1]:
        with pytest.raises(CorruptRecord):
            decode(good[:length], key)
    with pytest.raises(CorruptRecord):
        decode(good + b"\0", key)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": chain(range(1, 5))[0]},
        {"key": chain(range(4), tenant=b"other")[0]},
        {"key": chain(range(4), model=identity(adapters=(("a", b"b"),)))[0]},
        {"layers": range(1, 4), "num_layers": 4},
        {"num_layers": 4},
        {"like": DATA.to(torch.float16)},
        {"like": DATA.to(torch.float32)},
        {"like": DATA.transpose(2, 3).contiguous()},
        {"like": DATA[:2]},
    ],
    ids=range(9),
)
def test_a_record_of_something_else_is_seen(wrong, codec):
    with pytest.raises(CorruptRecord):
        decode(encoded(codec), **{"key": key_for(codec)} | wrong)


@pytest.mark.parametrize("asked", Precision)
def test_a_record_answers_for_its_own_precision_alone(asked, codec):
    """Though its checksums are right, and whatever its header says."""
    good = encoded(codec)
    key = chain(range(4), precision=asked)[0]
    if asked is codec.precision:
        decode(good, key)
        return
    with pytest.raises(CorruptRecord, match=r"precision is|KV in a block"):
        decode(good, key)
    payload = np.frombuffer(good, np.uint8, offset=record.HEADER_BYTES)
    forged = record.sealed(payload, key, LAYERS, DATA.shape, DATA.dtype, codec)
    if codec.precision is Precision.EXACT:
        decode(forged, key)  # better than asked for
        return
    with pytest.raises(CorruptRecord, match=f"{codec.name} KV in a block that is {asked.name}"):
        decode(forged, key)
    with pytest.raises(ValueError, match=f"no {codec.name} KV"):
        record.encode(key, torch.zeros_like(DATA), LAYERS, 3, codec)


def test_a_header_that_names_an_unknown_codec_or_version_is_seen():
    header = record._unpack(memoryview(encoded()))
    for change in ({"codec": 99}, {"version": 1}, {"magic": b"XXXX"}, {"raw_bytes": 1}):
        with pytest.raises(CorruptRecord):
            decode(record._pack(header._replace(**change)) + encoded()[record.HEADER_BYTES :])


def test_one_flipped_bit_anywhere_in_a_block_entry_is_seen():
    entry = Entry(KEY, DATA.dtype, DATA.shape, 3, LOSSLESS, 5000, 7, 1, 9, (77,))
    good = entry.pack()
    assert unpack(KEY.digest, good) == entry
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 16
        with pytest.raises(CorruptRecord):
            unpack(KEY.digest, bytes(bad))
    for other in (good[:-1], good + b"\0", good + bytes(8), b""):
        with pytest.raises(CorruptRecord):
            unpack(KEY.digest, other)
    with pytest.raises(CorruptRecord):
        unpack(b"x" * 32, good)


def test_an_entry_of_a_block_that_lost_more_than_its_key_tells_is_refused():
    for asked in Precision:
        key = chain(range(4), precision=asked)[0]
        for codec in CODECS.values():
            packed = Entry(key, DATA.dtype, DATA.shape, 3, codec, 1, 7, 1, 9, (77,)).pack()
            if codec.precision in (Precision.EXACT, asked):
                assert unpack(key.digest, packed).codec is codec
                continue
            with pytest.raises(CorruptRecord, match=f"{codec.name} KV in a block"):
                unpack(key.digest, packed)


@pytest.fixture(scope="module")
def tier(tmp_path_factory):
    tier = DiskTier(tmp_path_factory.mktemp("flips") / "store", 1 << 20)
    yield tier
    tier.close()


def swap_entry(tier, change):
    """Change stored bytes behind the tier's back."""
    env = tier.access.ledger.env
    with env.lmdb.begin(write=True) as txn:
        txn.put(KEY.digest, change(txn.get(KEY.digest, db=env.entries)), db=env.entries)


@given(st.data())
def test_a_flipped_bit_on_disk_is_a_miss_until_the_block_is_put_again(tier, data):
    tier.put([(KEY, KVBlock(DATA))])
    is_record = data.draw(st.booleans())
    length = (
        len(encoded())
        if is_record
        else len(Entry(KEY, DATA.dtype, DATA.shape, 3, RAW, 0, 0, 0, 0, (0,)).pack())
    )
    at = data.draw(st.integers(0, length - 1) | st.sampled_from([0, length - 1]))

    def flip(stored):
        assert len(stored) == length
        bad = np.frombuffer(stored, np.uint8).copy()
        bad[at] ^= data.draw(st.integers(1, 255))
        return bad.tobytes()

    seen = tier.corrupt
    if is_record:
        change_record(tier, KEY, 0, flip)
    else:
        swap_entry(tier, flip)
    assert tier.read(KEY, range(3)) is None
    assert tier.get(KEY) is None
    assert KEY not in tier
    assert (tier.corrupt, tier.quarantined) == (seen + 1, 1)
    tier.put([(KEY, KVBlock(DATA))])
    assert right(tier.get(KEY), KEY)
    assert tier.quarantined == 0


def test_a_record_of_which_a_part_is_there_is_a_miss(tier):
    for length in (0, 1, 175, 176, 500):
        tier.put([(KEY, KVBlock(DATA))])
        change_record(tier, KEY, 0, lambda stored, n=length: stored[:n])
        assert tier.get(KEY) is None


def test_a_record_behind_the_end_of_its_file_is_a_miss(tier):
    tier.put([(KEY, KVBlock(DATA))])
    os.truncate(tier.access.ledger.env.values.path, 0)
    assert tier.read(KEY, range(1)) is None
