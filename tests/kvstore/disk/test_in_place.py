"""Reads around the page cache go to where the KV belongs, and to no byte beside it."""

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
import torch

from kvstore import layout
from kvstore.block import KVBlock
from kvstore.codecs.known import BY_NAME, exact_codec
from kvstore.disk import fetch
from kvstore.disk.fetch import Part
from kvstore.disk.tier import DiskTier
from kvstore.disk.values import PAGE_BYTES
from kvstore.disk.ways import CACHED, DIRECT
from native.library import library
from tests.kvstore.cold import drop, is_in_memory
from tests.kvstore.make import chain, content, identity, items, same
from tests.kvstore.stored import flip, values_file

WHOLE = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 2 layers: 4 pages
PART = identity(num_layers=6, num_kv_heads=3, head_dim=48)  # 2 layers: 9,216 bytes, 18 sectors
ODD = identity(num_layers=6, num_kv_heads=1, head_dim=52)  # 2 layers: 3,328 bytes, less than a page
MODELS = {"pages": WHOLE, "sectors": PART, "less": ODD}
SIZE = 8
GROUP = {name: 2 * 2 * np.prod(model.block_shape(SIZE)[1:]) for name, model in MODELS.items()}


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path, monkeypatch):
    if library(fetch.SOURCE) is None:
        pytest.skip("no C compiler here: all is read in one way")
    if is_in_memory(tmp_path):
        pytest.skip("the temporary folder is in memory")
    copy = Part.copy  # at once, or for a second look
    monkeypatch.setattr(Part, "copy", lambda self, _: pytest.fail("copied by Python"))
    return copy


def keys_of(model, count=24, **of):
    return chain(range(SIZE * count), model=model, size=SIZE, **of)


def cold(path, blocks, codec="raw"):
    """A tier that holds blocks, none of which is in the page cache."""
    with closing(DiskTier(path, 1 << 30, exact_codec(codec))) as tier:
        tier.put(blocks)
    drop(values_file(path))
    return DiskTier(path, 1 << 30, exact_codec(codec))


def rows_of(count, layers, model, skipped):
    """Memory full of sevens, and rows in it that begin `skipped` bytes behind a page."""
    size = torch.Size((count, len(layers), *model.block_shape(SIZE)[1:]))
    nbytes = size.numel() * model.torch_dtype.itemsize
    room = torch.frombuffer(mmap.mmap(-1, nbytes + 4 * PAGE_BYTES), dtype=torch.uint8).fill_(7)
    start = PAGE_BYTES + skipped
    return room, slice(start, start + nbytes), size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("skipped", [0, 512, 64, 4])
@pytest.mark.parametrize("layers", [range(6), range(1, 4), range(2, 4)], ids=str)
def test_every_byte_and_no_other_is_written(tmp_path, monkeypatch, name, skipped, layers):
    model = MODELS[name]
    monkeypatch.setattr(layout, "TARGET_BYTES", GROUP[name])
    keys = keys_of(model)
    room, place, size = rows_of(len(keys), layers, model, skipped)
    out = room[place].view(model.torch_dtype).view(size)
    with closing(cold(tmp_path / "s", items(keys, model))) as tier:
        seen = watched(monkeypatch)
        assert tier.read_many(keys, layers, out) == [True] * len(keys)
        assert seen == [DIRECT] * len(keys) * len({layer // 2 for layer in layers})
    for key, row in zip(keys, out, strict=True):
        assert same(row, content(key, model)[layers.start : layers.stop])
    assert set(room[: place.start].tolist() + room[place.stop :].tolist()) == {7}


def watched(monkeypatch):
    """The ways that records take from now on."""
    seen, took = [], fetch.Ways.took
    monkeypatch.setattr(fetch.Ways, "took", lambda *a: seen.append(a[2]) or took(*a))
    return seen


@pytest.mark.parametrize("skipped", [0, 64])
def test_what_is_aligned_does_not_pass_through_other_memory(tmp_path, monkeypatch, skipped):
    monkeypatch.setattr(layout, "TARGET_BYTES", GROUP["pages"])
    keys = keys_of(WHOLE)
    room, place, size = rows_of(len(keys), range(6), WHOLE, skipped)
    out = room[place].view(WHOLE.torch_dtype).view(size)
    with closing(cold(tmp_path / "s", items(keys, WHOLE))) as tier:
        assert all(tier.read_many(keys, range(6), out))
        first, second = np.split(tier.access.env.ways._scratch.held, 2)
    assert first[:PAGE_BYTES].any()  # headers
    assert second[:PAGE_BYTES].any()
    assert first[PAGE_BYTES:].any() == second[PAGE_BYTES:].any() == bool(skipped)


@pytest.mark.parametrize("codec", BY_NAME)
@pytest.mark.parametrize("layers", [range(6), range(1, 4)], ids=str)
def test_every_codec_lands_where_a_disk_can_write(tmp_path, monkeypatch, codec, layers):
    monkeypatch.setattr(layout, "TARGET_BYTES", GROUP["pages"])
    keys = keys_of(WHOLE, precision=BY_NAME[codec].precision)
    seed = torch.Generator().manual_seed(0)
    shape = WHOLE.block_shape(SIZE)
    blocks = [(key, KVBlock(torch.randn(shape, generator=seed).to(torch.bfloat16))) for key in keys]
    out = torch.zeros(len(keys), len(layers), *shape[1:], dtype=torch.bfloat16)
    landings, job = [], Part.job
    monkeypatch.setattr(Part, "job", lambda self, *a: landings.append(self) or job(self, *a))
    with closing(cold(tmp_path / "s", blocks, codec)) as tier:
        seen = watched(monkeypatch)
        assert tier.read_many(keys, layers, out) == [True] * len(keys)
        assert set(seen) == {DIRECT}
        warm = torch.zeros_like(out)
        tier.read_many(keys, layers, warm)  # through the page cache
        tier.read_many(keys, layers, warm)  # and out of it
        whole = [tier.get(key) for key in keys]
    assert torch.equal(out, warm)
    assert torch.equal(out, torch.stack([b.data[layers.start : layers.stop] for b in whole]))
    copied = [part._landed for part in landings if part._landed.base is not part._wanted.base]
    assert all(landed.ctypes.data % PAGE_BYTES == 0 for landed in copied)


def test_rows_beside_each_other_are_read_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", GROUP["sectors"])
    keys = keys_of(PART, 96)
    room, place, size = rows_of(len(keys), range(6), PART, 0)
    out = room[place].view(PART.torch_dtype).view(size)
    with closing(cold(tmp_path / "s", items(keys, PART))) as tier, ThreadPoolExecutor(4) as threads:
        runs = [slice(at, at + 3) for at in range(0, len(keys), 3)]
        found = list(threads.map(lambda run: tier.read_many(keys[run], range(6), out[run]), runs))
    assert found == [[True] * 3] * len(runs)
    assert all(same(row, content(key, PART)) for key, row in zip(keys, out, strict=True))


def test_memory_that_only_a_processor_can_write_to_is_written_by_one(tmp_path, monkeypatch):
    secret = ctypes.CDLL(None).syscall(447, 0)  # memfd_secret: devices have no access
    if secret < 0:
        pytest.skip("this kernel has no such memory")
    keys, nbytes = keys_of(WHOLE), 24 * content(keys_of(WHOLE)[0], WHOLE).nbytes
    os.ftruncate(secret, nbytes)
    try:
        pages = mmap.mmap(secret, nbytes)
    except OSError as error:
        pytest.skip(f"no such memory is left: {error}")
    finally:
        os.close(secret)
    room = torch.frombuffer(pages, dtype=WHOLE.torch_dtype)
    out = room.view(len(keys), *WHOLE.block_shape(SIZE))
    with closing(cold(tmp_path / "s", items(keys, WHOLE))) as tier:
        seen = watched(monkeypatch)
        assert all(tier.read_many(keys, range(6), out))
    assert set(seen) == {CACHED}
    assert all(same(row, content(key, WHOLE)) for key, row in zip(keys, out, strict=True))


@pytest.mark.parametrize("at", [-1, 176, 0])
def test_a_damaged_record_costs_its_block_alone(tmp_path, monkeypatch, on_a_disk, at):
    monkeypatch.setattr(Part, "copy", on_a_disk)
    monkeypatch.setattr(layout, "TARGET_BYTES", GROUP["sectors"])
    keys = keys_of(PART)
    room, place, size = rows_of(len(keys), range(6), PART, 512)
    out = room[place].view(PART.torch_dtype).view(size)
    with closing(cold(tmp_path / "s", items(keys, PART))) as tier:
        flip(tier, keys[7], 1, at)
        drop(values_file(tmp_path / "s"))
        assert tier.read_many(keys, range(6), out) == [number != 7 for number in range(len(keys))]
    for number, (key, row) in enumerate(zip(keys, out, strict=True)):
        assert number == 7 or same(row, content(key, PART))
