"""How much of a tier belongs to whom: counted as blocks come and go, by owner, kind and codec."""

from contextlib import closing

import pytest

from kvstore.block import Kind, tenant_tag
from kvstore.codecs.known import RAW
from kvstore.disk.audit import audit_tier
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.tally import Group, Usage, of_tenants
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items

ONE = chain(range(12), tenant=b"one")
TWO = chain(range(8), tenant=b"two")
CHUNK = chain(range(4), tenant=b"two", kind=Kind.CHUNK, warmup=b"w")
COST = entry_cost(content(ONE[0], identity()))


def group(keys):
    return Group(keys[0].tenant, keys[0].kind, RAW.code)


@pytest.fixture(params=["host", "disk"])
def tier(request, tmp_path):
    made = HostTier(1 << 20) if request.param == "host" else DiskTier(tmp_path / "kv", 1 << 20)
    with closing(made) as tier:
        yield tier


def test_blocks_are_counted_by_owner_and_kind(tier):
    cost = tier.cost(*items(ONE)[0])
    for keys in (ONE, TWO, CHUNK):
        tier.put(items(keys))
    assert tier.groups() == {
        group(keys): Usage(len(keys) * cost, len(keys)) for keys in (ONE, TWO, CHUNK)
    }
    assert of_tenants(tier.groups()) == {ONE[0].tenant: 3 * cost, TWO[0].tenant: 3 * cost}
    tier.delete(ONE[2:])
    tier.put(items(TWO))  # there already
    tier.delete(CHUNK)
    assert tier.groups() == {group(ONE): Usage(2 * cost, 2), group(TWO): Usage(2 * cost, 2)}
    assert sum(of_tenants(tier.groups()).values()) == tier.used_bytes
    tier.clear()
    assert tier.groups() == {}


def test_counts_stay_on_disk_and_damaged_ones_are_counted_anew(tmp_path):
    with closing(DiskTier(tmp_path / "kv", 1 << 20)) as tier:
        tier.put(items(ONE))
        tier.put(items(TWO))
        wanted = tier.groups()
    with closing(DiskTier(tmp_path / "kv", 1 << 20)) as tier:
        assert tier.groups() == wanted
        env = tier.access.ledger.env
        for damage in (lambda row: row[:-1], lambda row: bytes([row[0] ^ 1]) + row[1:]):
            with env.lmdb.begin(write=True) as txn:
                cursor = txn.cursor(env.info)
                assert cursor.set_range(b"group")
                cursor.put(cursor.key(), damage(cursor.value()))
            assert tier.groups() == wanted
            tier.delete(TWO[1:])
            tier.put(items(TWO))
            assert tier.groups() == wanted
            audit_tier(tier, repair=True)


def test_an_audit_sees_and_repairs_what_belongs_to_others(tmp_path):
    with closing(DiskTier(tmp_path / "kv", 1 << 20)) as tier:
        tier.put(items(ONE))
        with tier.access.changing() as txn:
            tier.access.ledger._tally.change(txn, group(TWO), COST, 1)
        assert "miscounts what belongs to whom" in audit_tier(tier, repair=True).problems[0]
        assert audit_tier(tier, repair=False).clean
        assert tier.groups() == {group(ONE): Usage(3 * COST, 3)}


def test_a_tag_says_who_is_one_owner_and_not_who():
    secrets = [b"", b"a", b"a\0", b"b"]
    tags = {tenant_tag(secret) for secret in secrets}
    assert len(tags) == 4
    assert {len(tag) for tag in tags} == {8}
    assert {key.tenant for key in ONE} == {tenant_tag(b"one")}
