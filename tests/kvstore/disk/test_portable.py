"""Blocks in a file: what comes back is what was written, and what is damaged is counted."""

import io
import stat
import struct
from contextlib import closing

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.known import LOSSLESS, RAW
from kvstore.disk import entry, portable
from kvstore.disk.portable import MAGIC, export, imported
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreFormatError
from kvstore.summary import ages, rows
from tests.kvstore.make import chain, content, identity, items, same
from tests.kvstore.stored import flip

KEYS = chain(range(20))
OTHERS = chain(range(8), tenant=b"other")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable")
    with closing(DiskTier(folder / "store", 1 << 20)) as tier:
        tier.put(items([*KEYS, *OTHERS]))
        done = export(tier, folder / "blocks", lambda entry: True)
        assert stat.S_IMODE((folder / "blocks").stat().st_mode) == 0o600
        assert (done.blocks, done.damaged) == (7, 0)
        assert done.nbytes == (folder / "blocks").stat().st_size
    return (folder / "blocks").read_bytes()


def read(data):
    return list(imported(io.BytesIO(data)))


def right(found):
    return all(same(block.data, content(key, identity())) for key, block in found)


def test_all_blocks_come_back_parents_first(written):
    found = read(written)
    assert {key for key, _ in found} == {*KEYS, *OTHERS}
    assert right(found)
    depths = [key.depth for key, _ in found]
    assert depths == sorted(depths)
    assert {key.tenant for key, _ in found} == {KEYS[0].tenant, OTHERS[0].tenant}


def test_some_blocks_may_be_chosen_and_codecs_stay(tmp_path):
    with closing(DiskTier(tmp_path / "store", 1 << 20, LOSSLESS)) as tier:
        tier.put(items([*KEYS, *OTHERS]))
        chosen = export(tier, tmp_path / "f", lambda entry: entry.key.tenant == OTHERS[0].tenant)
    assert chosen.blocks == 2
    found = read((tmp_path / "f").read_bytes())
    assert {key for key, _ in found} == set(OTHERS)
    assert right(found)


@settings(max_examples=200)
@given(st.data())
def test_a_flipped_byte_costs_at_most_the_block_it_is_in(written, data):
    at = data.draw(st.integers(len(MAGIC), len(written) - 1))
    bad = bytearray(written)
    bad[at] ^= data.draw(st.integers(1, 255))
    found = read(bytes(bad))
    whole = [item for item in found if item is not None]
    assert right(whole)
    assert len(whole) >= 6
    assert (None in found) == (len(whole) < 7)


@settings(max_examples=60)
@given(st.data())
def test_a_file_cut_short_has_the_blocks_before(written, data):
    end = data.draw(st.integers(len(MAGIC), len(written) - 1))
    found = read(written[:end])
    whole = [item for item in found if item is not None]
    assert right(whole)
    assert whole == found or (found[-1] is None and len(whole) == len(found) - 1)


def framed(digest, stored, sizes):
    """A frame whose checksum holds, whatever it says."""
    head = portable._HEAD.pack(portable._MARK, digest, len(stored), len(sizes))
    head += b"".join(map(portable._SIZE.pack, sizes))
    return head + portable._CHECK.pack(xxhash.xxh3_64_intdigest(head)) + stored


AT = {"kind": 85, "precision": 98, "dtype": 99, "group_layers": 114, "tokens": 106, "heads": 102}


@pytest.mark.parametrize("field", AT)
@pytest.mark.parametrize("value", [0, 7, 255])
def test_whoever_made_a_file_may_say_anything(written, field, value):
    """A block of what this version does not know, or of no sense, is left out as a damaged one."""
    head = portable._read_head(io.BytesIO(written[len(MAGIC) :]))
    start = len(MAGIC) + head.nbytes
    packed = bytearray(written[start : start + head.entry_bytes - 8])
    packed[AT[field]] = value
    stored = bytes(packed) + struct.pack("<Q", entry._checksum(head.digest, bytes(packed)))
    rest = written[start + head.entry_bytes :]
    first, *others = read(MAGIC + framed(head.digest, stored, head.record_bytes) + rest)
    assert first is None or right([first])  # as it was, or as good
    assert right(others)
    assert len(others) == 6


@pytest.mark.parametrize("size", [1 << 63, 1 << 40])
def test_a_block_that_says_it_is_larger_than_its_file_costs_itself(written, size):
    first, *others = read(MAGIC + framed(bytes(32), b"", [size]) + written[len(MAGIC) :])
    assert first is None
    assert right(others)
    assert len(others) == 7


@pytest.mark.parametrize("data", [b"", b"headrace", b"PK\3\4" * 100, MAGIC.replace(b"1", b"7")])
def test_another_file_is_refused(data):
    with pytest.raises(StoreFormatError, match="headrace store export"):
        read(data)


def test_a_damaged_block_is_left_out_with_what_rests_on_it(tmp_path):
    with closing(DiskTier(tmp_path / "store", 1 << 20)) as tier:
        tier.put(items(KEYS))
        flip(tier, KEYS[2])
        done = export(tier, tmp_path / "blocks", lambda entry: True)
    assert (done.blocks, done.damaged) == (2, 3)
    assert [key for key, _ in read((tmp_path / "blocks").read_bytes())] == KEYS[:2]


def test_an_export_that_fails_leaves_no_file(tmp_path, monkeypatch):
    with closing(DiskTier(tmp_path / "store", 1 << 20)) as tier:
        tier.put(items(KEYS))

        def fails(*_):
            raise RuntimeError("no")

        monkeypatch.setattr(portable, "records", fails)
        with pytest.raises(RuntimeError, match="no"):
            export(tier, tmp_path / "blocks", lambda entry: True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_summary_says_who_has_what_and_how_old_it_is(tmp_path):
    with closing(DiskTier(tmp_path / "store", 1 << 20)) as tier:
        assert ages(tier) is None
        tier.put(items(OTHERS))
        tier.put(items(KEYS))
        found = rows(tier.groups())
        assert [(row["tenant"], row["blocks"]) for row in found] == [
            (KEYS[0].tenant.hex(), 5),
            (OTHERS[0].tenant.hex(), 2),
        ]
        assert {(row["class"], row["codec"]) for row in found} == {("exact", RAW.name)}
        aged = ages(tier)
        assert 0 <= aged.youngest_s <= aged.median_s <= aged.oldest_s < 600
        assert ages(tier, now_ns=0) == (0, 0, 0)  # a clock that was set back


def test_what_goes_meanwhile_is_not_called_damaged(tmp_path, monkeypatch):
    with closing(DiskTier(tmp_path / "store", 1 << 20)) as tier:
        tier.put(items([*KEYS, *OTHERS]))
        records = portable.records

        def overtaken(access, digest):
            tier.delete([KEYS[2]])
            return records(access, digest)

        monkeypatch.setattr(portable, "records", overtaken)
        done = export(tier, tmp_path / "blocks", lambda entry: True)
    gone = len(KEYS) - 2
    assert (done.blocks, done.damaged, done.gone) == (2 + len(OTHERS), 0, gone)
