"""A server that is gone, hung, emptied or lying costs a miss: no wrong KV, no stall, no memory."""

import errno
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest

from kvstore.errors import TimedOut
from kvstore.remote import connection
from kvstore.remote.address import Address
from kvstore.remote.config import RemoteConfig
from kvstore.remote.tier import RemoteTier
from kvstore.remote.wire import Wire
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, items, right
from tests.kvstore.remote.liar import LIES, Liar
from tests.kvstore.remote.server import SECRET, Server, serving

KEYS = chain(range(40))
BYTES = content(KEYS[0], identity()).nbytes
TIMEOUT_S = 0.4
MARGIN_S = 1.5  # of a busy machine
WAIT_S = 20.0


def opened(config, host=100):
    return TieredStore([HostTier(host * BYTES)], remote=RemoteTier(config, secret=SECRET))


def impatient(url, **changes):
    return RemoteConfig(
        url=url, timeout_s=TIMEOUT_S, connect_timeout_s=TIMEOUT_S, retry_s=0.05, **changes
    )


def answers(store):
    """Wait until the store's server is asked again."""
    changed = store._remote._writer._changed
    with changed:
        return changed.wait_for(lambda: not store._remote._breaker.is_open, WAIT_S)


def fails(store):
    changed = store._remote._writer._changed
    with changed:
        return changed.wait_for(lambda: store._remote._breaker.is_open, WAIT_S)


def drained(store):
    return store._remote.drain(WAIT_S)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="headrace-") as path:
        yield Path(path)


@pytest.fixture
def own_server():
    """For tests that are not kind to it."""
    with serving() as server:
        yield server


class Stopwatch:
    """No call may take longer than one time-out."""

    def __init__(self):
        self.longest = 0.0

    def __call__(self, call, *args):
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            self.longest = max(self.longest, time.perf_counter() - start)

    def check(self, limit_s=TIMEOUT_S):
        assert self.longest < limit_s + MARGIN_S


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_a_miss_in_time_and_in_little_memory(folder, name):
    liar, timed = Liar(folder / "redis"), Stopwatch()
    try:
        with opened(impatient(f"unix://{folder}/redis")) as store:
            assert not store.stats().remote.is_open
            liar.lie = LIES[name]
            for key in KEYS[:5]:
                assert timed(store.get, key) is None
            timed.check()
            assert liar.sent < 1 << 21  # what the system buffers
            stats = store.stats()
            noted = stats.remote.failures + stats.tiers["remote"].corrupt
            assert noted or name == "empty_value"
    finally:
        liar.close()


def test_a_liar_is_set_aside_and_an_honest_server_in_its_place_is_used(folder):
    liar = Liar(folder / "redis")
    try:
        store = opened(impatient(f"unix://{folder}/redis"))
        liar.lie = LIES["nonsense"]
        assert [store.get(key) for key in KEYS[:3]] == [None] * 3
        assert store.stats().remote.openings == 1
    finally:
        liar.close()
    (folder / "redis").unlink()
    server = Server(folder)
    try:
        with store:
            assert answers(store)
            store.put(items(KEYS))
            assert drained(store)
        with opened(server.config()) as other:
            assert other.lookup(KEYS) == 10
    finally:
        server.kill()


def test_a_hung_server_stalls_nobody_twice_and_is_used_again(own_server, caplog):
    timed = Stopwatch()
    with opened(impatient(own_server.url), host=1) as store:
        store.put(items(KEYS))
        assert drained(store)
        assert store.lookup(KEYS) == 10
        own_server.hang()
        try:
            assert timed(store.lookup, KEYS) <= 1
            timed.check()
            calls = Stopwatch()
            for key in KEYS[1:]:
                assert calls(store.get, key) is None
                assert calls(store.lookup, [key]) == 0
            store.put(items(chain(range(100, 140))))
            calls.check(0.0)
            stats = store.stats()
            assert stats.remote.is_open
            assert stats.remote.time_outs >= 1
            assert stats.remote.queued_bytes == 0
            assert caplog.text.count("is set aside") == 1
        finally:
            own_server.go_on()
        assert answers(store)
        assert store.lookup(KEYS) == 10
        assert right(store.get(KEYS[5]), KEYS[5])


def test_a_killed_server_is_a_miss_and_after_its_restart_takes_blocks_again(own_server):
    timed = Stopwatch()
    with opened(impatient(own_server.url), host=1) as store:
        store.put(items(KEYS))
        assert drained(store)
        own_server.kill()
        for _ in range(5):
            assert timed(store.lookup, KEYS[1:]) == 0
        timed.check(0.0)
        assert fails(store)
        own_server.start()
        assert answers(store)
        assert store.lookup(KEYS[1:]) == 0
        store.put(items(KEYS))
        assert drained(store)
        assert store.lookup(KEYS) == 10
        assert all(right(store.get(key), key) for key in KEYS)


def test_a_quick_restart_costs_nothing_but_the_blocks(own_server):
    with opened(own_server.config()) as store:
        store.put(items(KEYS))
        assert drained(store)
        own_server.kill()
        own_server.start()
        assert store.lookup(chain(range(100, 104))) == 0
        store.put(items(chain(range(100, 104))))
        assert drained(store)
        assert store.stats().remote.failures == 0
    with opened(own_server.config()) as store:
        assert store.lookup(chain(range(100, 104))) == 1


def test_blocks_that_are_flushed_between_lookup_and_read_are_misses(own_server):
    with opened(own_server.config(), host=1) as store, own_server.client() as client:
        store.put(items(KEYS))
        assert drained(store)
        assert store.lookup(KEYS) == 10
        client.flushall()
        assert [store.get(key) for key in KEYS[1:]] == [None] * 9
        assert store.stats().remote.failures == 0
        assert store.stats().tiers["remote"].corrupt == 0


def test_a_server_that_is_not_there_does_not_keep_a_store_from_opening(folder, caplog):
    with opened(impatient(f"unix://{folder}/nobody")) as store:
        store.put(items(KEYS))
        assert store.lookup(KEYS) == 10
        stats = store.stats()
        assert stats.remote.is_open
        assert stats.tiers["remote"].skipped == 10
        assert "is set aside" in caplog.text


def test_what_waits_for_a_slow_server_is_bounded_and_counted(own_server):
    config = impatient(own_server.url, queue_bytes=4 * BYTES)
    timed = Stopwatch()
    with opened(config) as store:
        own_server.hang()
        try:
            timed(store.put, items(KEYS))
            timed(store.flush)
            timed.check(0.0)
            stats = store.stats()
            assert stats.remote.queued_bytes <= 4 * BYTES
            assert stats.tiers["remote"].skipped >= 6
        finally:
            own_server.go_on()


def test_a_password_is_needed_and_shown_nowhere(folder, caplog):
    server = Server(folder, "--requirepass", "hush-hush")
    try:
        url = f"unix://:hush-hush@{server.path}?db=3"
        with opened(impatient(url)) as store:
            store.put(items(KEYS))
            assert drained(store)
            assert not store.stats().remote.is_open
            assert "hush" not in repr(impatient(url))
        with opened(impatient(url)) as store:
            assert store.lookup(KEYS) == 10
        for wrong in (server.url, f"unix://:wrong-one@{server.path}"):
            with opened(impatient(wrong)) as store:
                assert store.stats().remote.is_open
        assert "NOAUTH" in caplog.text
        assert "AUTH was refused" in caplog.text
        assert "hush" not in caplog.text
        assert "wrong-one" not in caplog.text
    finally:
        server.kill()


@pytest.mark.parametrize("host", ["cache..internal", "x" * 70 + ".internal"])
def test_a_host_that_is_no_name_is_tried_after_pauses(host, caplog):
    with opened(impatient(f"redis://{host}")) as store:
        time.sleep(0.5)
        assert store.lookup(KEYS) == 0
        assert 1 <= store.stats().remote.failures <= 30  # a pause is 25 ms at least
        assert "no address" in caplog.text
        assert "Traceback" not in caplog.text


def test_no_file_for_a_connection_is_a_miss(own_server, monkeypatch):
    with opened(own_server.config(retry_s=0.05)) as store:
        assert answers(store)
        store._remote._guarded.backend.close()

        def none_left(*_):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(connection.socket, "socket", none_left)
        assert store.lookup(KEYS) == 0
        time.sleep(0.5)
        assert store.stats().remote.failures <= 30


def test_whatever_a_probe_meets_the_next_one_comes_after_a_pause(own_server, monkeypatch, caplog):
    with opened(own_server.config(retry_s=0.05)) as store:
        backend = store._remote._guarded.backend

        probes = []

        def broken():
            probes.append(time.monotonic())
            raise RuntimeError("nobody has thought of this")

        monkeypatch.setattr(backend, "resolve", broken)
        own_server.kill()
        while not store.stats().remote.is_open:
            store.lookup(KEYS)
        time.sleep(0.5)
        assert 1 <= len(probes) <= 30
        assert "nobody has thought of this" in caplog.text


def test_an_address_that_swallows_packets_leaves_time_for_the_next(monkeypatch):
    times, wire = [], mock.Mock(spec=Wire)

    def opens(sock, where, address, tls, until):
        times.append(until - time.monotonic())
        sock.close()
        if where == "first":
            raise TimedOut("no connection in time")
        return wire

    monkeypatch.setattr(connection, "_opened", opens)
    places = [(connection.socket.AF_INET, name) for name in ("first", "second")]
    assert connection.connected(places, Address("two", 6379), None, 10.0) is wire
    assert times == pytest.approx([5.0, 10.0], abs=0.5)


def test_no_connection_is_kept_behind_the_end(own_server):
    with opened(own_server.config()) as store:
        assert answers(store)
        backend = store._remote._guarded.backend
    backend.exists_many([b"name"])
    assert not backend._idle
