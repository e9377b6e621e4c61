"""Nobody is served the KV of another model, tenant, dtype or adapter."""

from dataclasses import replace

import pytest

from kvstore.block import Kind
from kvstore.config import StoreConfig
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from tests.kvstore.make import chain, identity, items
from tests.kvstore.stored import change_record, entry_of

OTHERS = [
    {"tenant": b"other"},
    {"model": identity(weights=b"other")},
    {"model": identity(dtype="float16")},
    {"model": identity(adapters=(("lora", b"1"),))},
    {"model": identity(rope="other")},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_blocks_of_somebody_else_are_never_found(tmp_path, other):
    config = StoreConfig(host_bytes=1 << 20, disk_path=str(tmp_path / "store"))
    with TieredStore.open(config) as store:
        mine, theirs = chain(range(12)), chain(range(12), **other)
        store.put(items(mine))
        store.flush()
        assert store.lookup(mine) == 3
        assert store.lookup(theirs) == 0
        assert all(store.get(key) is None for key in theirs)


@pytest.mark.parametrize("parts", ["values", "entries", "values, entries", "page"])
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_a_record_copied_by_hand_under_another_key_is_a_miss(tmp_path, other, parts):
    tier = DiskTier(tmp_path / "store", 1 << 20)
    model = other.get("model", identity())
    [mine], [theirs] = chain(range(4)), chain(range(4), **other)
    tier.put(items([mine]) + items([theirs], model))
    env = tier.access.ledger.env
    if "values" in parts:
        stolen = entry_of(tier, mine)
        record = bytes(env.values.record(stolen.page, stolen.sizes[0]))
        change_record(tier, theirs, 0, lambda stored: record)
    if "entries" in parts:
        with env.lmdb.begin(write=True) as txn:
            txn.put(theirs.digest, txn.get(mine.digest, db=env.entries), db=env.entries)
    if "page" in parts:
        with env.lmdb.begin(write=True) as txn:
            moved = replace(entry_of(tier, theirs), page=entry_of(tier, mine).page)
            txn.put(theirs.digest, moved.pack(), db=env.entries)
    assert tier.get(theirs) is None
    assert tier.corrupt == 1
    assert tier.get(mine) is not None
    tier.close()


@pytest.mark.parametrize(
    "forged",
    [
        {"identity": b"i" * 32}, {"parent": b"p" * 32}, {"token_digest": b"t" * 16},
        {"num_tokens": 3}, {"kind": Kind.CHUNK}, {"depth": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_digest_alone_opens_nothing(tmp_path, forged):
    tier = DiskTier(tmp_path / "store", 1 << 20)
    tier.put(items(chain(range(4))))
    key = replace(chain(range(4))[0], **forged)
    assert tier.held([key]) == [False]
    assert tier.get(key) is None
    tier.close()
