import gc
import mmap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import KVBlock
from kvstore.spares import LEAST_PAGES_BYTES, Spares
from kvstore.store import TieredStore
from kvstore.tier import HostTier
from tests.kvstore.make import chain, content, identity, right, same

MAPS = Path("/proc/self/maps")
SHAPE = (3, 2, 2, 4, 8)
NBYTES = 3 * 2 * 2 * 4 * 8 * 2


def test_memory_is_used_again_once_its_last_view_is_gone():
    spares = Spares()
    first = spares.empty(SHAPE, torch.bfloat16)
    address, view = first.data_ptr(), first[1, 0].view(torch.int16).numpy()
    del first
    second = spares.empty(SHAPE, torch.bfloat16)
    assert second.data_ptr() != address, "a view of it was still there"
    del view
    assert spares.nbytes == NBYTES
    assert spares.empty(SHAPE, torch.float16).data_ptr() == address


def test_what_is_free_stays_within_the_limit():
    spares = Spares(limit_bytes=2 * NBYTES)
    kept = [spares.empty(SHAPE, torch.bfloat16) for _ in range(4)]
    kept.append(spares.empty((5,), torch.bfloat16))
    del kept
    assert spares.nbytes <= 2 * NBYTES
    spares.close()
    assert spares.nbytes == 0
    spares.empty(SHAPE, torch.bfloat16)
    assert spares.nbytes == 0


def test_the_size_that_was_not_asked_for_longest_goes_first():
    spares = Spares(limit_bytes=2 * NBYTES)
    old, new = spares.empty((NBYTES // 2,), torch.bfloat16), spares.empty((NBYTES,), torch.bfloat16)
    address = new.data_ptr()
    del old, new
    assert spares.nbytes == 2 * NBYTES
    assert spares.empty((NBYTES,), torch.bfloat16).data_ptr() == address


def test_a_block_that_is_a_view_leaves_the_bigger_tensor_behind():
    spares = Spares()
    block = KVBlock(torch.randn(8, 2, 2, 3, 4, 8)[1])
    owned = spares.owned(block)
    assert owned.data.untyped_storage().nbytes() == block.nbytes
    assert torch.equal(owned.data, block.data)
    assert spares.owned(owned) is owned


def test_memory_that_comes_back_while_another_is_handed_out_waits_for_nobody():
    """As where the garbage collector drops a tensor in the midst of `empty`."""
    spares = Spares()
    held = [spares.empty(SHAPE, torch.bfloat16)]
    with spares._lock:
        held.clear()
    assert spares.empty(SHAPE, torch.bfloat16) is not None
    assert spares.nbytes == NBYTES


def test_a_cycle_that_is_collected_gives_its_memory_back():
    spares = Spares()
    cycle = [spares.empty(SHAPE, torch.bfloat16)]
    cycle.append(cycle)
    gone = weakref.ref(cycle[0])
    del cycle
    gc.collect()
    assert gone() is None
    assert spares.nbytes == NBYTES


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=40))
def test_no_two_tensors_share_memory(steps):
    spares = Spares(limit_bytes=1000)
    held: dict[int, torch.Tensor] = {}
    for slot, size in steps:
        held.pop(slot, None)
        held[slot] = spares.empty((100 * size,), torch.int16 if size == 1 else torch.float32)
        held[slot].fill_(slot)
        assert all((tensor == number).all() for number, tensor in held.items())
        assert spares.nbytes <= 1000


def test_a_reader_keeps_what_it_reads_from_being_written_over():
    """Blocks come and go in a full store; whoever has got one still has its KV afterwards."""
    model = identity()
    keys = chain(range(4 * 40), model=model)
    cost = content(keys[0], model).nbytes
    both = torch.empty(2, *model.block_shape(4), dtype=torch.bfloat16)
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for key in keys:
                block = store.get(key)
                if block is not None and not right(block, key, model):
                    wrong.append(key.digest.hex())

    with TieredStore([HostTier(4 * cost)]) as store:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(5):
            for key in keys:
                both[0] = content(key, model)
                store.put([(key, KVBlock(both[0]))])
            store.clear()
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def test_a_full_store_puts_into_the_memory_of_what_it_evicts():
    model = identity()
    first, *rest = (chain(range(4), model=model, tenant=bytes([i])) for i in range(6))
    rows = torch.stack([content(key[0], model) for key in (first, *rest)])
    with TieredStore([HostTier(2 * rows[0].nbytes)]) as store:
        seen = set()
        for key, row in zip((first, *rest), rows):
            store.put([(key[0], KVBlock(row))])
            found = store.get(key[0])
            seen.add(found.data.data_ptr())
            assert same(found.data, row)
            del found
        assert len(seen) == 3  # two that are stored, and one on its way in


@pytest.mark.skipif(not MAPS.exists(), reason="needs /proc")
def test_large_memory_goes_back_to_the_system_when_it_is_not_kept():
    spares = Spares(limit_bytes=0)
    one = spares.empty((4 * LEAST_PAGES_BYTES,), torch.uint8)
    assert one.data_ptr() % mmap.PAGESIZE == 0, "a heap's memory begins behind its own notes"
    inside = one.data_ptr() + one.nbytes // 2
    one.fill_(1)
    assert is_mapped(inside)
    del one
    assert not is_mapped(inside)


def is_mapped(address):
    ranges = (line.split()[0].split("-") for line in MAPS.read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
