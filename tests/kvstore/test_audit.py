"""Damage on disk: a miss at once, and whole again after a repair."""

import logging

import pytest

from kvstore import ledger
from kvstore.disk import DiskTier
from kvstore.ledger import name
from kvstore.store import TieredStore
from tests.kvstore.make import chain, items, right

KEYS = chain(range(40))


@pytest.fixture
def store(tmp_path):
    with TieredStore([DiskTier(tmp_path / "store", 1 << 20)]) as store:
        store.put(items(KEYS))
        store.flush()
        yield store


def test_damage_is_a_miss_counted_and_logged_once_and_repaired(store, caplog):
    env = store._levels[0].tier.ledger.env
    with env.lmdb.begin(write=True) as txn:
        stored = bytearray(txn.get(name(KEYS[4].digest, 0), db=env.data))
        stored[-1] ^= 1
        txn.put(name(KEYS[4].digest, 0), bytes(stored), db=env.data)
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


DAMAGES = {
    "payload": ("data", lambda stored: stored[:-1] + bytes([stored[-1] ^ 1])),
    "entry": ("entries", lambda stored: bytes([stored[0] ^ 1]) + stored[1:]),
    "used": ("info", lambda stored: ledger._CHECKED.pack(10**6, 2**64 - 1 - 10**6)),
    "record": ("data", None),
    "block": ("entries", None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_audit_finds_and_repairs(store, damage):
    table, change = DAMAGES[damage]
    where = {"data": name(KEYS[4].digest, 0), "entries": KEYS[4].digest, "info": b"used"}[table]
    env = store._levels[0].tier.ledger.env
    with env.lmdb.begin(write=True) as txn:
        stored = txn.get(where, db=getattr(env, table))
        if change is None:
            assert txn.delete(where, db=getattr(env, table))
        else:
            assert txn.put(where, change(stored), db=getattr(env, table))
    assert not store.audit().clean
    report = store.audit(repair=True)
    assert report.repaired
    assert not report.clean
    assert store.audit().clean
    found = store.lookup(KEYS)
    assert found == (10 if damage == "used" else 4)
    store.put(items(KEYS))
    store.flush()
    assert store.lookup(KEYS) == 10
    assert all(right(store.get(key), key) for key in KEYS)
    assert store.audit().clean
