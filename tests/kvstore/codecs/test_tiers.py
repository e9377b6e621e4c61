"""Blocks in the disk tier, by every codec."""

from contextlib import closing

import pytest
import torch

from kvstore import layout
from kvstore.block import Kind, KVBlock, Precision
from kvstore.codecs.codec import byte_view
from kvstore.codecs.known import BY_NAME, LOSSLESS, RAW, exact_codec
from kvstore.config import StoreConfig
from kvstore.disk import fetch
from kvstore.disk.tier import DiskTier
from kvstore.record import HEADER_BYTES
from kvstore.store import TieredStore
from native.library import library
from tests.kvstore.make import chain, identity, same
from tests.kvstore.stored import flip

MODEL = identity(num_layers=6, num_kv_heads=4, head_dim=64)  # 16 KiB per layer of 16 tokens
LOSSY_NAMES = ("fp8", "int8", "k8v4", "int4")


def keys_of(name, tokens=range(70)):
    return chain(tokens, model=MODEL, size=16, precision=BY_NAME[name].precision)


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
def codec(request):
    return BY_NAME[request.param]


@pytest.fixture
def keys(codec):
    return keys_of(codec.name)


@pytest.fixture
def tier(codec, tmp_path):
    with closing(DiskTier(tmp_path / "store", 1 << 24, exact_codec(codec.name))) as tier:
        yield tier


def through(codec, data):
    """What is left of KV that a codec has encoded."""
    payload = codec.encode(data)
    out = torch.empty_like(data)
    landed = codec.landing(byte_view(out), out.shape, out.dtype, payload.nbytes)
    landed[:] = payload
    codec.decode(landed, out)
    return out


def blocks(keys, dtype=torch.bfloat16):
    made = []
    for key in keys:
        seed = torch.Generator().manual_seed(int.from_bytes(key.digest[:4], "little"))
        shape = MODEL.block_shape(key.num_tokens)
        made.append((key, KVBlock(torch.randn(shape, generator=seed).to(dtype))))
    return made


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layers", [range(6), range(1), range(1, 4), range(5, 6)], ids=str)
def test_any_run_of_layers_comes_back_decoded(tier, layers, codec, keys):
    items = blocks(keys)
    tier.put(items)
    out = torch.zeros(len(items), len(layers), *items[0][1].data.shape[1:], dtype=torch.bfloat16)
    assert tier.read_many(keys, layers, out) == [True] * len(items)
    for (key, block), row in zip(items, out):
        left = through(codec, block.data)
        assert same(left, block.data) == (codec.precision is Precision.EXACT)
        assert same(row, left[layers.start : layers.stop])
        assert same(tier.read(key, layers), row)
        assert same(tier.get(key).data, left)


@pytest.mark.usefixtures("way")
def test_a_flipped_byte_anywhere_is_a_miss(tier, keys):
    tier.put(blocks(keys))
    for key, at in zip(keys, (HEADER_BYTES, HEADER_BYTES + 1, 5000, -1), strict=True):
        flip(tier, key, 1, at)
    assert [tier.get(key) for key in keys] == [None] * len(keys)
    assert tier.corrupt == len(keys)
    tier.put(blocks(keys))
    assert None not in [tier.get(key) for key in keys]


def test_the_budget_counts_what_is_written(tier, codec, keys):
    items = blocks(keys)
    tier.put(items)
    sizes = tier.sizes([key.digest for key in keys] + [b"absent"])
    assert tier.used_bytes == sum(sizes)
    assert sizes == [r.nbytes for r in sorted(tier.residents(), key=lambda r: r.depth)] + [0]
    for (key, block), size in zip(items, sizes):
        assert size <= tier.cost(key, block)
    with tier.access.reading() as txn:
        entry = tier.access.ledger.get(txn, keys[0].digest)
    assert entry.codec is codec
    for size, group in zip(entry.sizes, entry.groups):
        part = items[0][1].data[group.start : group.stop]
        most = codec.payload_bytes(part.shape, part.dtype)
        assert size < 0.7 * part.nbytes if codec is LOSSLESS else size == most


@pytest.mark.parametrize(("codec", "most"), [("raw", 3), ("lossless", 4), ("int8", 5), ("int4", 6)])
def test_more_blocks_fit_where_they_are_smaller(tmp_path, codec, most):
    """Also through the policy, which must know what each block takes and not what it might."""
    items = [blocks(keys_of(codec, range(100 * i, 100 * i + 16)))[0] for i in range(9)]
    budget = 3 * RAW.payload_bytes(items[0][1].data.shape, torch.bfloat16) + 3 * 9 * 4096
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
    items = blocks(keys_of("raw"))
    with closing(DiskTier(tmp_path / "store", 1 << 24, LOSSLESS)) as tier:
        tier.put(items[:2])
    with closing(DiskTier(tmp_path / "store", 1 << 24, RAW)) as tier:
        tier.put(items)
        assert all(same(tier.get(key).data, block.data) for key, block in items)


def test_a_codec_that_is_not_known_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"codec is one of raw, lossless, fp8.*, got 'gzip'"):
        StoreConfig(codec="gzip")


@pytest.mark.parametrize("name", LOSSY_NAMES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_a_codec_cannot_write_are_written_losslessly(name, number, tmp_path):
    items = blocks(keys_of(name))
    items[1][1].data[4, 1, 2, 3, 5] = number
    with closing(DiskTier(tmp_path / "store", 1 << 24, LOSSLESS)) as tier:
        tier.put(items)
        codecs = []
        for key, block in items:
            with tier.access.reading() as txn:
                codecs.append(tier.access.ledger.get(txn, key.digest).codec)
            assert same(tier.get(key).data, through(codecs[-1], block.data))
    assert [codec.name for codec in codecs] == [name, "lossless", name, name, name][: len(items)]


@pytest.mark.parametrize("name", LOSSY_NAMES)
def test_a_block_that_a_codec_would_not_shrink_is_written_losslessly(name, tmp_path):
    """Scales of a channel take more than the few numbers of a short block's channel."""
    keys = chain(
        range(17), model=MODEL, size=16, kind=Kind.CHUNK, precision=BY_NAME[name].precision
    )
    items = blocks(keys)
    with closing(DiskTier(tmp_path / "store", 1 << 24)) as tier:
        tier.put(items)
        with tier.access.reading() as txn:
            used = [tier.access.ledger.get(txn, key.digest).codec.name for key in keys]
        assert tier.used_bytes <= sum(tier.cost(*item) for item in items)
    assert used == [name, name if name == "fp8" else "lossless"]


@pytest.mark.parametrize("name", LOSSY_NAMES)
def test_exact_blocks_stay_exact_where_a_lossy_codec_is_set(name, tmp_path):
    config = StoreConfig(host_bytes=0, disk_path=str(tmp_path / "s"), codec=name)
    exact, lossy = keys_of("raw"), keys_of(name)
    assert config.precision is lossy[0].precision
    with TieredStore.open(config) as store:
        store.put(blocks(exact))
        store.flush()
        assert store.lookup(lossy) == 0
        store.put([(key, block) for key, (_, block) in zip(lossy, blocks(exact))])
        store.flush()
        for key, other, (_, block) in zip(exact, lossy, blocks(exact)):
            assert same(store.get(key).data, block.data)
            assert not same(store.get(other).data, block.data)


def test_chains_of_different_precision_have_no_name_in_common():
    names = [key.digest for name in BY_NAME if name != "lossless" for key in keys_of(name)]
    assert len(set(names)) == len(names) == 5 * len(keys_of("raw"))
    assert keys_of("raw") == keys_of("lossless")


def test_exact_blocks_are_written_by_no_lossy_codec(tmp_path):
    for name in LOSSY_NAMES:
        with pytest.raises(ValueError, match=f"exact blocks are .* not {name}"):
            DiskTier(tmp_path / "store", 1 << 24, BY_NAME[name])
