"""Whoever may write to the server can make blocks misses, and never change what one is."""

import dataclasses
import random
import struct
from collections import Counter

import pytest
import torch

from kvstore.block import KVBlock
from kvstore.errors import CorruptRecord
from kvstore.layout import layer_groups
from kvstore.remote.breaker import LIES
from kvstore.remote.index import MAX_INDEX_BYTES, Index, unpack
from kvstore.remote.seal import SEAL_BYTES, Seals
from kvstore.remote.tier import RemoteTier
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.remote.server import SECRET

MODEL = identity(num_layers=4, num_kv_heads=4, head_dim=8)
KEYS = chain(range(8), model=MODEL)
WAIT_S = 20.0
SEALS = Seals(SECRET, "headrace")


def opened(server, secret=SECRET, **settings):
    return TieredStore(
        [HostTier(1 << 24)], remote=RemoteTier(server.config(**settings), secret=secret)
    )


@pytest.fixture
def values(server):
    """Two blocks as they lie on the server: by name, all of them."""
    return written(server, KEYS)


def written(server, keys, secret=SECRET):
    with server.client() as client:
        before = set(client.scan_iter())
        with opened(server, secret=secret) as store:
            store.put(items(keys, MODEL))
            assert store._remote.drain(WAIT_S)
        return {name: client.get(name) for name in client.scan_iter() if name not in before}


def served(store, key):
    """Whether a block is served; if so, it is right."""
    block = store.get(key)
    assert block is None or right(block, key, MODEL)
    return block is not None


def classes(value, is_index):
    """Which bytes of a value are what."""
    if is_index:
        return {"head": range(28), "sizes": range(28, 32), "seals": range(32, 64),
                "seal": range(len(value) - SEAL_BYTES, len(value))}  # fmt: skip
    return {"magic": range(4), "version to dtype": range(4, 12), "identity": range(12, 44),
            "key": range(44, 76), "shape": range(76, 100), "tokens and sizes": range(100, 136),
            "checksum": range(136, 176), "payload": range(176, len(value))}  # fmt: skip


def flips(values, dice, count):
    """Places of single bits, as many in every class of every value."""
    for name, value in values.items():
        for kind, places in classes(value, is_index=name.endswith(b"}")).items():
            for _ in range(count):
                yield kind, name, dice.choice(places), dice.randrange(8)


def flip_all(server, values, count):
    names = {name: key for key in KEYS for name in values if key.digest.hex().encode() in name}
    seen = Counter()
    with server.client() as client:
        for kind, name, place, bit in flips(values, random.Random(count), count):
            damaged = bytearray(values[name])
            damaged[place] ^= 1 << bit
            client.set(name, bytes(damaged))
            tier = RemoteTier(server.config(), secret=SECRET)
            assert tier.get(names[name]) is None, (kind, name, place, bit)
            assert tier.snapshot().corrupt == 1
            other = next(key for key in KEYS if key != names[name])
            assert right(tier.get(other), other, MODEL)
            tier.close()
            for whole, value in values.items():
                client.set(whole, value)
            seen[kind] += 1
    return seen


def test_a_flipped_bit_anywhere_is_a_miss(server, values):
    seen = flip_all(server, values, count=2)
    assert len(seen) == 12
    assert min(seen.values()) >= 4


@pytest.mark.slow
def test_ten_thousand_flipped_bits_are_misses(server, values):
    seen = flip_all(server, values, count=420)
    assert sum(seen.values()) > 10_000


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 60, 100, 175, 176, 177, -1])
def test_a_value_that_is_cut_short_or_longer_is_never_wrong(server, values, cut):
    with server.client() as client:
        for name, value in values.items():
            client.set(name, value[:cut] if cut >= 0 else value + b"x")
        with opened(server) as store:
            there = [served(store, key) for key in KEYS]
            assert not any(there) or cut < 0


def test_values_that_change_places_are_misses(server, values):
    first, second = (
        sorted(name for name in values if key.digest.hex().encode() in name) for key in KEYS
    )
    with server.client() as client:
        for a, b in zip(first, second, strict=True):  # indexes; records
            client.set(a, values[b])
            client.set(b, values[a])
            with opened(server) as store:
                assert not any(served(store, key) for key in KEYS)
            for name, value in values.items():
                client.set(name, value)
        for a, b in zip(first, second, strict=True):  # the whole block
            client.set(a, values[b])
        with opened(server) as store:
            assert [served(store, key) for key in KEYS] == [False, True]


def test_records_of_one_block_that_change_places_are_misses(server):
    model = identity(num_layers=6, num_kv_heads=16, head_dim=2048)
    key = chain(range(4), model=model)[0]
    groups = layer_groups(6, content(key, model)[0].nbytes)
    assert len(groups) == 2
    with opened(server) as store:
        store.put(items([key], model))
        assert store._remote.drain(WAIT_S)
    names = [SEALS.record_name(key.digest, number) for number in (0, 1)]
    with server.client() as client, opened(server) as store:
        one, two = client.mget(names)
        client.mset({names[0]: two, names[1]: one})
        assert store.get(key) is None


def test_a_block_of_one_tenant_under_the_name_of_anothers_is_a_miss(server):
    ours, theirs = (chain(range(4), model=MODEL, tenant=tenant)[0] for tenant in (b"us", b"them"))
    values = written(server, [theirs])
    names = {theirs.digest.hex().encode(): ours.digest.hex().encode()}
    with server.client() as client:
        for name, value in values.items():
            for old, new in names.items():
                client.set(name.replace(old, new), value)
        with opened(server) as store:
            assert not served(store, ours)
            assert served(store, theirs)


def test_who_knows_the_secret_but_not_the_tenant_cannot_plant_a_block(server):
    """The name of a block shows on the server, so it is no proof of anything."""
    victim = chain(range(4), model=MODEL)[0]
    forger = dataclasses.replace(victim, seal_key=b"a guess")
    wrong = [(forger, items([victim], MODEL)[0][1])]
    with opened(server) as store:
        store.put(wrong)
        assert store._remote.drain(WAIT_S)
        assert store.get(forger) is not None
    with opened(server) as store:
        assert store.lookup([victim]) == 1
        assert store.get(victim) is None
        assert store.stats().tiers["remote"].corrupt == 1


def test_another_secret_meets_none_of_our_values(server, values):
    with opened(server, secret=b"another secret that is as long") as store:
        assert store.lookup(KEYS) == 0
        assert not any(served(store, key) for key in KEYS)
        assert store._remote.drain(WAIT_S)
    with opened(server) as store:
        assert all(served(store, key) for key in KEYS)


def test_values_of_two_writers_whose_numbers_differ_do_not_mix(server):
    key = KEYS[0]
    ours = written(server, [key])
    index = min(ours)
    rounded = content(key, MODEL).clone()
    rounded.view(torch.uint8)[0, 0, 0, 0, 0] ^= 1
    with server.client() as client:
        client.flushall()
        with opened(server) as store:
            store.put([(key, KVBlock(rounded))])
            assert store._remote.drain(WAIT_S)
        client.set(index, ours[index])
        with opened(server) as store:
            assert store.get(key) is None
            assert store._remote.drain(WAIT_S)
        assert client.dbsize() == 0  # whoever computes it next stores it whole


def test_a_damaged_block_is_written_anew_by_who_computes_it(server, values):
    with server.client() as client, opened(server) as store:
        for name in values:
            client.set(name, b"rubbish")
        assert store.lookup(KEYS) == 2
        assert store.get(KEYS[0]) is None
        assert store.get(KEYS[1]) is None
        assert store.lookup(KEYS) == 0
        assert store._remote.drain(WAIT_S)
        assert client.dbsize() <= 2  # records that no index named
        store.put(items(KEYS, MODEL))
        assert store._remote.drain(WAIT_S)
    with opened(server) as store:
        assert all(served(store, key) for key in KEYS)


def test_a_lookup_that_a_deletion_overtakes_finds_nothing_that_is_damaged(server, values):
    with server.client() as client, opened(server) as store:
        for name in values:
            client.set(name, b"rubbish")
        assert store.get(KEYS[0]) is None
        guarded = store._remote._guarded
        guarded.distrust(KEYS[0].digest, "again", damaged=False)
        ask = guarded.ask

        def overtaken(call):
            found = ask(call)
            guarded.trust(KEYS[0].digest)
            return [True for _ in found]  # as it was when they were asked for

        guarded.ask = overtaken
        assert store.lookup(KEYS) == 0
        guarded.ask = ask


def test_a_value_of_another_type_under_our_name_is_a_miss(server, values):
    with server.client() as client:
        for name in values:
            client.delete(name)
            client.rpush(name, b"a list")
        with opened(server) as store:
            assert not any(served(store, key) for key in KEYS)
            assert store.stats().remote.failures == 0


def sealed(key, packed):
    return memoryview(packed + SEALS.of(key, 0xFFFFFFFF, packed))


def test_an_index_of_another_format_is_refused_even_if_sealed():
    key, data = KEYS[0], content(KEYS[0], MODEL)
    index = Index(data.dtype, data.shape, 4, (100,), (bytes(32),))
    good = index.pack(key, SEALS)
    assert unpack(memoryview(good), key, SEALS) == index
    body = good[:-SEAL_BYTES]
    assert len(body) < MAX_INDEX_BYTES
    for change in (
        body[:-1],
        body[:10],
        b"",
        b"XXXX" + body[4:],
        body[:4] + struct.pack("<H", 9) + body[6:],
        body[:6] + b"\x77" + body[7:],
        body[:24] + struct.pack("<I", 0) + body[28:],
        body[:24] + struct.pack("<I", 1) + body[28:],
        body + body[28:],
        body[:28] + struct.pack("<I", 1 << 31) + body[32:],
    ):
        with pytest.raises(CorruptRecord, match="index"):
            unpack(sealed(key, change), key, SEALS)


def test_a_server_of_damaged_records_is_set_aside(server):
    keys = chain(range(40), model=MODEL)
    values = written(server, keys)
    with server.client() as client:
        for name, value in values.items():
            if not name.endswith(b"}"):
                client.set(name, value[:-1] + bytes([value[-1] ^ 1]))
    with opened(server) as store:
        assert not any(served(store, key) for key in keys)
        numbers = store.stats()
        assert numbers.remote.openings == 1
        assert LIES <= numbers.tiers["remote"].corrupt < len(keys)


def test_one_damaged_record_among_good_ones_does_not_set_a_server_aside(server):
    keys = chain(range(40), model=MODEL)
    values = written(server, keys)
    damaged = [name for name in values if keys[3].digest.hex().encode() in name]
    with server.client() as client:
        for name in damaged:
            client.set(name, values[name][:-1] + bytes([values[name][-1] ^ 1]))
    with opened(server) as store:
        assert [served(store, key) for key in keys] == [i != 3 for i in range(10)]
        assert store.stats().remote.openings == 0
