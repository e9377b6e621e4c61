"""Damage on disk: a miss at once, and whole again after a repair."""

import logging

import pytest

from kvstore.disk import ledger, space
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from tests.kvstore.make import chain, items, right
from tests.kvstore.stored import change_record, flip

KEYS = chain(range(40))


@pytest.fixture
def store(tmp_path):
    with TieredStore([DiskTier(tmp_path / "store", 1 << 20)]) as store:
        store.put(items(KEYS))
        store.flush()
        yield store


def test_damage_is_a_miss_counted_and_logged_once_and_repaired(store, caplog):
    flip(store._levels[0].tier, KEYS[4])
    with caplog.at_level(logging.WARNING):
        assert [store.get(KEYS[4]) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert KEYS[4].digest.hex() in caplog.text
    stats = store.stats().tiers["disk"]
    assert (stats.corrupt, stats.quarantined) == (1, 1)
    assert store.lookup(KEYS) == 4
    assert not store.audit(repair=True).clean
    assert store.audit().clean
    store.put(items(KEYS))
    store.flush()
    assert store.lookup(KEYS) == 10
    assert store.audit().clean
    assert store.stats().tiers["disk"].quarantined == 0


def test_a_block_that_is_put_for_a_damaged_one_brings_what_rested_on_it(store):
    """The damaged one goes with all that rests on it, in the transaction that writes it anew."""
    tier = store._levels[0].tier
    flip(tier, KEYS[4])
    assert store.get(KEYS[4]) is None
    store.put(items(KEYS))
    store.flush()
    assert store.lookup(KEYS) == 10
    assert all(right(store.get(key), key) for key in KEYS)
    assert store.audit().clean


DAMAGES = {
    "payload": ("values", lambda stored: stored[:-1] + bytes([stored[-1] ^ 1])),
    "record": ("values", lambda stored: b""),
    "entry": (KEYS[4].digest, lambda stored: bytes([stored[0] ^ 1]) + stored[1:]),
    "block": (KEYS[4].digest, None),
    "used": (b"used", lambda stored: ledger._CHECKED.pack(10**6, 2**64 - 1 - 10**6)),
    "free pages": (space._NAME, lambda stored: space._packed([], 10**6)),
    "free pages, damaged": (space._NAME, lambda stored: bytes([stored[0] ^ 1]) + stored[1:]),
    "no free pages": (space._NAME, None),
}  # fmt: skip
NOTES = {"used", "free pages", "free pages, damaged", "no free pages"}  # cost no block


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_audit_finds_and_repairs(store, damage):
    where, change = DAMAGES[damage]
    tier = store._levels[0].tier
    env = tier.access.ledger.env
    if where == "values":
        change_record(tier, KEYS[4], 0, change)
    else:
        table = env.entries if where == KEYS[4].digest else env.info
        with env.lmdb.begin(write=True) as txn:
            stored = txn.get(where, db=table)
            done = (
                txn.delete(where, db=table)
                if change is None
                else txn.put(where, change(stored), db=table)
            )
            assert done
    assert not store.audit().clean
    report = store.audit(repair=True)
    assert report.repaired
    assert not report.clean
    assert store.audit().clean
    found = store.lookup(KEYS)
    assert found == (10 if damage in NOTES else 4)
    store.put(items(KEYS))
    store.flush()
    assert store.lookup(KEYS) == 10
    assert all(right(store.get(key), key) for key in KEYS)
    assert store.audit().clean
