"""Blocks in the disk tier, by every codec."""

from contextlib import closing

import pytest
import torch

from kvstore import fetch, layout
from kvstore.block import KVBlock
from kvstore.codecs.known import BY_NAME, LOSSLESS, RAW
from kvstore.config import StoreConfig
from kvstore.disk import DiskTier
from kvstore.store import TieredStore
from native.library import library
from tests.kvstore.make import chain, identity, same

MODEL = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 16 KiB per layer of 16 tokens
KEYS = chain(range(70), model=MODEL, size=16)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(layout, "TARGET_BYTES", 32768)


@pytest.fixture(params=["C", "Python"])
def way(request, monkeypatch):
    """How records are copied: with a compiler, or without."""
    if request.param == "Python":
        monkeypatch.setattr(fetch, "library", lambda _: None)
    elif library(fetch.SOURCE) is None:
        pytest.skip("no C compiler here")


@pytest.fixture(params=BY_NAME)
def tier(request, tmp_path):
    with closing(DiskTier(tmp_path / "store", 1 << 24, BY_NAME[request.param])) as tier:
        yield tier


def blocks(keys=KEYS, dtype=torch.bfloat16):
    made = []
    for key in keys:
        seed = torch.Generator().manual_seed(int.from_bytes(key.digest[:4], "little"))
        shape = MODEL.block_shape(key.num_tokens)
        made.append((key, KVBlock(torch.randn(shape, generator=seed).to(dtype))))
    return made


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layers", [range(6), range(1), range(1, 4), range(5, 6)], ids=str)
def test_any_run_of_layers_comes_back_decoded(tier, layers):
    items = blocks()
    tier.put(items)
    out = torch.zeros(len(items), len(layers), *items[0][1].data.shape[1:], dtype=torch.bfloat16)
    assert tier.read_many(KEYS, layers, out) == [True] * len(items)
    for (key, block), row in zip(items, out):
        assert same(row, block.data[layers.start : layers.stop])
        assert same(tier.read(key, layers), row)
        assert same(tier.get(key).data, block.data)


@pytest.mark.usefixtures("way")
def test_a_flipped_byte_anywhere_is_a_miss(tier, tmp_path):
    tier.put(blocks())
    with tier.reading() as txn:
        entries = [tier.ledger.get(txn, key.digest) for key in KEYS]
    with (tmp_path / "store" / "data.mdb").open("r+b") as file:
        for entry, at in zip(entries, (0, 1, 5000, entries[3].sizes[1] - 1)):
            file.seek(entry.pages[1] * 4096 + 16 + 176 + at)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 32]))
    assert [tier.get(key) for key in KEYS] == [None] * len(KEYS)
    assert tier.corrupt == len(KEYS)
    tier.put(blocks())
    assert None not in [tier.get(key) for key in KEYS]


def test_the_budget_counts_what_is_written(tier):
    items = blocks()
    tier.put(items)
    sizes = tier.sizes([key.digest for key in KEYS] + [b"absent"])
    assert tier.used_bytes == sum(sizes)
    assert sizes == [r.nbytes for r in sorted(tier.residents(), key=lambda r: r.depth)] + [0]
    for (key, block), size in zip(items, sizes):
        assert size <= tier.cost(key, block)
    with tier.reading() as txn:
        entry = tier.ledger.get(txn, KEYS[0].digest)
    assert entry.codec is tier._codec
    for size, group in zip(entry.sizes, entry.groups):
        raw = len(group) * items[0][1].data[0].nbytes
        assert size == raw if entry.codec is RAW else size < 0.7 * raw


@pytest.mark.parametrize(("codec", "most"), [("raw", 3), ("lossless", 4)])
def test_more_blocks_fit_where_they_are_smaller(tmp_path, codec, most):
    """Also through the policy, which must know what each block takes and not what it might."""
    items = [blocks(chain(range(100 * i, 100 * i + 16), model=MODEL, size=16))[0] for i in range(9)]
    budget = 3 * RAW.payload_bytes(items[0][1].data.shape, torch.bfloat16) + 3 * 5 * 4096
    config = StoreConfig(
        host_bytes=0, disk_path=str(tmp_path / "s"), disk_bytes=budget, codec=codec
    )
    with TieredStore.open(config) as store:
        for item in items:
            store.put([item])
            store.flush()
        found = [store.get(key) for key, _ in items]
        stats = store.stats().tiers["disk"]
    assert [block is not None for block in found] == [False] * (9 - most) + [True] * most
    assert (stats.blocks, stats.evictions, stats.skipped) == (most, 9 - most, 0)
    assert stats.used_bytes <= budget


def test_a_tier_reads_what_another_codec_wrote(tmp_path):
    items = blocks()
    with closing(DiskTier(tmp_path / "store", 1 << 24, LOSSLESS)) as tier:
        tier.put(items[:2])
    with closing(DiskTier(tmp_path / "store", 1 << 24, RAW)) as tier:
        tier.put(items)
        assert all(same(tier.get(key).data, block.data) for key, block in items)


def test_a_codec_that_is_not_known_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"codec is one of raw, lossless.*, got 'gzip'"):
        StoreConfig(codec="gzip")
