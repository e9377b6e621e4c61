"""The thread that writes to disk: bounded, and honest about failures."""

import threading

import pytest

from kvstore import store as store_module
from kvstore.allowance import Allowance
from kvstore.disk import writer as writer_module
from kvstore.disk.ledger import Ledger
from kvstore.disk.packed import entry_cost
from kvstore.disk.tier import DiskTier
from kvstore.errors import StoreError
from kvstore.store import TieredStore
from tests.kvstore.make import chain, content, identity, items, right

KEYS = chain(range(40))
COST = entry_cost(content(KEYS[0], identity()))
BYTES = content(KEYS[0], identity()).nbytes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


def test_a_failed_write_is_reported_once_and_reads_go_on(path, monkeypatch, caplog):
    with TieredStore([DiskTier(path, 100 * COST)]) as store:
        store.put(items(KEYS[:2]))
        store.flush()

        def fail(*_args, **_kwargs):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "add", fail)
            for keys in (KEYS[2:10], KEYS[10:]):
                store.put(items(keys))
                store.settle()
            [said] = caplog.messages
            assert "8 blocks were not stored" in said
            assert "Input/output error" in said
            patch.setattr(writer_module, "AGAIN_S", 0.0)  # that time is over
            store.put(items(KEYS[2:]))
            store.settle()
            assert len(caplog.messages) == 2
            with pytest.raises(StoreError, match="Input/output error"):
                store.flush()
        store.flush()
        assert store.lookup(KEYS) == 2
        assert right(store.get(KEYS[0]), KEYS[0])
        store.put(items(KEYS))
        store.flush()
        assert store.lookup(KEYS) == 10


def test_the_queue_is_bounded(path, monkeypatch):
    gate, seen = threading.Event(), []
    add = Ledger.add

    def slow(self, txn, block):
        gate.wait()
        seen.append(store._writer.queued_bytes)
        add(self, txn, block)

    monkeypatch.setattr(Ledger, "add", slow)
    with TieredStore([DiskTier(path, 100 * COST)], queue_bytes=3 * BYTES) as store:
        putting = threading.Thread(target=store.put, args=(items(KEYS),))
        putting.start()
        gate.set()
        putting.join()
        store.flush()
        assert max(seen) <= 3 * BYTES
        assert store.lookup(KEYS) == 10


class Paused(Allowance):
    """Nothing may be written after the first batch."""

    def delay_s(self):
        return 3600.0 if self._left < 0 else 0.0


def test_a_limit_on_writes_never_stalls_a_put_and_what_does_not_fit_is_counted(path, monkeypatch):
    monkeypatch.setattr(store_module, "Allowance", lambda rate, _burst: Paused(rate, 0))
    tier = DiskTier(path, 100 * COST)
    with TieredStore([tier], queue_bytes=3 * BYTES, write_bytes_per_s=1) as store:
        store.put(items(KEYS[:1]))
        store.flush()  # the first batch, which spends more than there is
        store.put(items(KEYS[1:]))
        assert store.stats().queued_bytes == 3 * BYTES
        assert store.stats().tiers["disk"].skipped == 6
        store.close()  # writes the rest at once
    with TieredStore([DiskTier(path, 100 * COST)]) as store:
        assert store.lookup(KEYS) == 4


def test_an_allowance_is_a_rate_over_time_and_a_burst_after_a_pause():
    now = [0.0]
    allowance = Allowance(100.0, 50, lambda: now[0])
    assert allowance.delay_s() == 0
    allowance.spend(250)
    assert allowance.delay_s() == 2
    now[0] = 1.5
    assert allowance.delay_s() == 0.5
    assert allowance.delay_s(30) == 0.8
    now[0] = 1000
    assert allowance.delay_s() == 0
    allowance.spend(60)
    assert allowance.delay_s() == pytest.approx(0.1)
    assert allowance.delay_s(1000) == pytest.approx(0.6)  # of more than a burst, a burst
