"""Pools that overflow to disk: every token comes back, in bounded memory, or an error says why."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import CorruptRecord, PoolFull, StoreError
from kvstore.pinned import PinnedTier
from kvstore.pool import Pool
from kvstore.rows import PoolShape, Raw, RowLayout
from kvstore.spill import BATCH_BYTES, Spill

FP32 = Raw(torch.float32)


def shaped(dim=8, tokens=4, layers=2):
    return PoolShape(layers, 2, RowLayout(FP32, FP32, dim, torch.float32), tokens)


SMALL = shaped()  # blocks of 512 B, which share LMDB's pages
LARGE = shaped(dim=64, tokens=16)  # of 16 KiB, with pages of their own


def disk_bytes(shape, blocks):
    pages = -(-(shape.layer_bytes + 16) // 4096)
    return blocks * shape.num_layers * pages * 4096


def made(folder, shape=LARGE, slots=3, blocks=20, tier=Pool):
    spill = Spill(Path(folder) / "spill", disk_bytes(shape, blocks))
    return tier(shape, slots * shape.block_bytes, spill=spill)


def numbers(shape, count, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (shape.num_layers, 2, shape.num_kv_heads, count, shape.layout.head_dim)
    return torch.randn(size, generator=generator)


def filled(pool, count, seed=0):
    lease = pool.lease()
    return lease, fill(lease, pool, count, seed)


def fill(lease, pool, count, seed):
    lease.reserve(count)
    data = numbers(pool.shape, count, seed)
    for layer, (k, v) in enumerate(data):
        lease.write(layer, 0, k, v)
    return data


def right(lease, layer, ids, data):
    got = lease.gather(layer, ids)
    index = ids[..., None].expand(-1, -1, data.shape[-1])
    return all(torch.equal(x, data[layer, i].gather(1, index)) for i, x in enumerate(got))


def all_ids(pool, count):
    return torch.arange(count).expand(pool.shape.num_kv_heads, -1)


class PoolMachine(RuleBasedStateMachine):
    """Several leases against tensors that remember what was written."""

    @initialize(shape=st.sampled_from([SMALL, LARGE]), slots=st.integers(1, 4))
    def open(self, shape, slots):
        self.folder = tempfile.mkdtemp()
        self.pool = made(self.folder, shape, slots, blocks=12)
        self.leases = []  # (lease, [L 2 Hk T D], tokens written in each layer)
        self.held = []  # (exit stack, lease, layer, ids, rows)
        self.seed = 0

    @rule()
    def lease(self):
        nothing = numbers(self.pool.shape, 0, 0)
        self.leases.append([self.pool.lease(), nothing])

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), count=st.integers(1, 40), same=st.booleans())
    def append(self, which, count, same):
        entry = self.leases[which % len(self.leases)]
        lease, old = entry
        length = old.shape[3]
        try:
            lease.reserve(length + count)
        except PoolFull:
            needed = -(-(length + count) // self.pool.shape.block_tokens) - len(lease.table)
            assert needed > self.pool.free_blocks
            return
        entry[1] = torch.cat([old, self.fresh(count)], 3)
        self.write(entry, length, length + count)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), share=st.floats(0, 1), count=st.integers(1, 20))
    def write_again(self, which, share, count):
        entry = self.leases[which % len(self.leases)]
        length = entry[1].shape[3]
        lo = int(share * length)
        hi = min(length, lo + count)
        entry[1] = entry[1].clone()
        entry[1][..., lo:hi, :] = self.fresh(hi - lo)
        self.write(entry, lo, hi)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), layer=st.integers(0, 1), count=st.integers(0, 30))
    def gather(self, which, layer, count):
        lease, data = self.leases[which % len(self.leases)]
        ids = self.some_ids(data, count)
        blocks = lease.table[ids.view(-1) // self.pool.shape.block_tokens].numpy()
        if self.room(layer) or self.pool.slots(layer)._resident[blocks].all():
            assert right(lease, layer, ids, data)
        else:
            with pytest.raises(PoolFull, match=r"all .* held; raise capacity_bytes"):
                lease.gather(layer, ids)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), layer=st.integers(0, 1), count=st.integers(1, 3))
    def hold(self, which, layer, count):
        lease, data = self.leases[which % len(self.leases)]
        ids = self.some_ids(data, count)
        stack = ExitStack()
        try:
            rows = stack.enter_context(lease.held(layer, ids))
        except PoolFull:
            blocks = len(np.unique(ids // self.pool.shape.block_tokens))
            assert blocks > self.room(layer)
            return
        self.held.append((stack, lease, layer, ids, rows))

    @precondition(lambda self: self.held)
    @rule()
    def let_go(self):
        self.held.pop(0)[0].close()

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9), layer=st.integers(0, 1), count=st.integers(0, 30))
    def promote(self, which, layer, count):
        lease, data = self.leases[which % len(self.leases)]
        if self.room(layer):
            lease.promote(layer, self.some_ids(data, count))

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 9))
    def close(self, which):
        lease, _ = self.leases.pop(which % len(self.leases))
        for hold in [h for h in self.held if h[1] is lease]:
            hold[0].close()
            self.held.remove(hold)
        lease.close()
        lease.close()

    @invariant()
    def everything_is_in_its_place(self):
        if not hasattr(self, "pool"):
            return
        taken = [block for lease, _ in self.leases for block in lease.table.tolist()]
        assert len(set(taken)) == len(taken) == self.pool.num_blocks - self.pool.free_blocks
        for layer in range(2):
            slots = self.pool.slots(layer)
            for block in np.flatnonzero(slots._resident):
                assert slots._occupied[slots._slot[block]]
                assert slots._block[slots._slot[block]] == block
            assert slots._occupied.sum() == slots._resident.sum()

    @invariant()
    def what_is_held_is_at_rest(self):
        for _, lease, layer, ids, rows in getattr(self, "held", []):
            data = next(data for other, data in self.leases if other is lease)
            flat = self.pool.flat(layer)[rows.view(-1)].unflatten(0, rows.shape)
            got = self.pool.shape.layout.decode(flat)
            for head in range(2):
                assert torch.equal(got.k[head], data[layer, 0, head, ids[head]])

    def write(self, entry, lo, hi):
        lease, data = entry
        for layer, (k, v) in enumerate(data):
            self.let_go_of(layer)
            lease.write(layer, lo, k[:, lo:hi], v[:, lo:hi])

    def let_go_of(self, layer):
        for hold in [h for h in self.held if h[2] == layer]:
            hold[0].close()
            self.held.remove(hold)

    def room(self, layer):
        return int((self.pool.slots(layer)._pins == 0).sum())

    def fresh(self, count):
        self.seed += 1
        return numbers(self.pool.shape, count, self.seed)

    def some_ids(self, data, count):
        self.seed += 1
        length = data.shape[3]
        generator = torch.Generator().manual_seed(self.seed)
        size = (2, count if length else 0)
        return torch.randint(0, max(1, length), size, generator=generator)

    def teardown(self):
        if hasattr(self, "pool"):
            while self.held:
                self.let_go()
            for lease, data in self.leases:
                for layer in range(2):
                    assert right(lease, layer, all_ids(self.pool, data.shape[3]), data)
                lease.close()
            self.pool.close()
            assert [p.name for p in Path(self.folder, "spill").iterdir()] == ["spill.lock"]
            shutil.rmtree(self.folder)


TestPoolAgainstTensors = PoolMachine.TestCase
TestPoolAgainstTensors.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("tier", [Pool, PinnedTier])
def test_every_token_comes_back_after_all_was_spilled(tmp_path, shape, slots, tier):
    pool = made(tmp_path, shape, slots, tier=tier)
    count = 6 * shape.block_tokens + 3
    lease, data = filled(pool, count)
    other, _ = filled(pool, slots * shape.block_tokens, seed=1)
    assert pool.stats().spilled_bytes >= shape.num_layers * 6 * shape.layer_bytes
    for layer in range(shape.num_layers):
        assert right(lease, layer, all_ids(pool, count), data)
        assert right(lease, layer, torch.tensor([[count - 1, 0], [0, count - 1]]), data)
    lease.close()
    other.close()
    pool.close()


def test_pools_with_and_without_a_spill_read_the_same(tmp_path):
    with closing(made(tmp_path, LARGE, slots=2)) as spilling:
        plain = Pool(LARGE, 20 * LARGE.block_bytes)
        (one, _), (two, _) = filled(spilling, 200), filled(plain, 200)
        ids = torch.randint(0, 200, (2, 500), generator=torch.Generator().manual_seed(0))
        for a, b in zip(one.gather(1, ids), two.gather(1, ids)):
            assert torch.equal(a, b)
        one.close()


def test_a_token_at_a_time_is_written_behind_spilled_ones(tmp_path):
    with closing(made(tmp_path, SMALL, slots=1)) as pool:
        data = [numbers(SMALL, 30, seed) for seed in range(2)]
        with pool.lease() as one, pool.lease() as two:
            for i in range(30):
                for lease, all_kv in zip((one, two), data):
                    lease.reserve(i + 1)
                    for layer, (k, v) in enumerate(all_kv):
                        lease.write(layer, i, k[:, i : i + 1], v[:, i : i + 1])
            for lease, all_kv in zip((one, two), data):
                assert right(lease, 1, all_ids(pool, 30), all_kv)


def test_the_statistics_count_blocks_and_bytes_and_clean_blocks_are_not_written_again(tmp_path):
    with closing(made(tmp_path, shaped(64, 16, layers=1), slots=2)) as pool:
        lease, data = filled(pool, 64)  # 4 blocks, the last 2 in memory
        size = pool.shape.layer_bytes
        assert (pool.stats().evictions, pool.stats().spilled_bytes) == (2, 2 * size)
        assert (pool.stats().hits, pool.stats().promotions) == (0, 0)
        for _ in range(3):
            assert right(lease, 0, all_ids(pool, 64), data)
        stats = pool.stats()
        assert (stats.promotions, stats.read_bytes) == (6, 6 * size)
        assert (stats.hits, stats.evictions) == (6, 8)
        assert stats.spilled_bytes == 4 * size  # each block once
        lease.write(0, 0, *data[0, :, :, :1])
        lease.gather(0, torch.arange(32, 64).expand(2, -1))
        assert pool.stats().spilled_bytes == 5 * size
        lease.close()


def test_the_block_used_longest_ago_goes_first(tmp_path):
    with closing(made(tmp_path, LARGE, slots=3)) as pool:
        lease, _ = filled(pool, 48)
        for token in (0, 33, 0, 17):
            lease.gather(0, torch.tensor([[token], [token]]))
        lease.reserve(64)
        lease.write(0, 48, *numbers(LARGE, 1, 0)[0])
        before = pool.stats().promotions
        lease.gather(0, torch.tensor([[0, 17], [0, 17]]))
        assert pool.stats().promotions == before
        lease.gather(0, torch.tensor([[33], [33]]))
        assert pool.stats().promotions == before + 1
        lease.close()


def test_promotion_ahead_of_time_makes_the_read_a_hit(tmp_path):
    with closing(made(tmp_path, LARGE, slots=2)) as pool:
        lease, data = filled(pool, 80)
        ids = torch.tensor([[3, 20], [20, 3]])
        lease.promote(1, ids)
        before = pool.stats().promotions
        assert right(lease, 1, ids, data)
        assert pool.stats().promotions == before
        lease.promote(1, all_ids(pool, 80))  # more than there is room for
        lease.close()


def test_rows_that_move_are_not_given_out_and_held_ones_stay(tmp_path):
    with closing(made(tmp_path, LARGE, slots=3)) as pool:
        lease, data = filled(pool, 100)
        ids = torch.tensor([[1, 40], [40, 1]])
        with pytest.raises(StoreError, match="rows move"):
            lease.rows(ids)
        with lease.held(0, ids) as rows:
            assert right(lease, 0, all_ids(pool, 100), data)  # through the slot that is left
            got = pool.shape.layout.decode(pool.flat(0)[rows.view(-1)].view(2, 2, -1))
            assert torch.equal(got.v[0], data[0, 1, 0, [1, 40]])
            need = r"3 blocks of a layer must .* room for 1; raise capacity"
            with (
                pytest.raises(PoolFull, match=need),
                lease.held(0, torch.tensor([[20, 60, 90]] * 2)),
            ):
                pass
        with pytest.raises(PoolFull, match=r"4 blocks .* room for 3"):
            lease.held(0, torch.tensor([[1, 20, 40, 60]] * 2)).__enter__()
        lease.close()


def test_a_pool_is_as_large_as_its_spill_and_must_be_larger_than_its_memory(tmp_path):
    pool = made(tmp_path, LARGE, slots=3, blocks=7)
    assert pool.num_blocks == 7
    assert pool.nbytes == 3 * LARGE.block_bytes
    lease = pool.lease()
    with pytest.raises(PoolFull, match="raise spill_bytes"):
        lease.reserve(8 * 16)
    lease.close()
    pool.close()
    for blocks, error in ((3, ValueError), (0, PoolFull)):
        spill = Spill(tmp_path, disk_bytes(LARGE, blocks) + 1)
        with closing(spill), pytest.raises(error, match="spill_bytes"):
            Pool(LARGE, 3 * LARGE.block_bytes, spill=spill)
    spill = Spill(tmp_path, disk_bytes(LARGE, 10))
    with closing(spill), pytest.raises(ValueError, match="host memory"):
        Pool(LARGE, 3 * LARGE.block_bytes, device="meta", spill=spill)


def test_two_threads_with_a_lease_each_evict_each_others_blocks(tmp_path):
    pool = made(tmp_path, LARGE, slots=2, blocks=40)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(12):
            count = 20 + (37 * i + 11 * seed) % 200
            lease, data = filled(pool, count, seed=100 * seed + i)
            for layer in (0, 1, 1, 0):
                ids = torch.randint(0, count, (2, 60), generator=generator)
                if not right(lease, layer, ids, data):
                    wrong.append((seed, i, layer))
            lease.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.free_blocks == 40
    pool.close()


def test_the_file_stays_bounded_however_often_blocks_change(tmp_path):
    with closing(made(tmp_path, LARGE, slots=1, blocks=8)) as pool:
        for seed in range(30):
            filled(pool, 8 * 16, seed)[0].close()
        (file,) = tmp_path.glob("spill/spill-*/data.mdb")
        assert file.stat().st_size < disk_bytes(LARGE, 8) * 1.5 + (1 << 20)


def test_more_than_a_transaction_holds_is_written_in_several(tmp_path):
    with closing(Spill(tmp_path, 1 << 30)) as spill:
        values = [np.full(1 << 20, i, np.uint8) for i in range(2 * BATCH_BYTES // (1 << 20) + 3)]
        spill.write(list(enumerate(values)))
        back = [np.empty(1 << 20, np.uint8) for _ in values]
        spill.read(list(enumerate(back)))
        assert all((b == i).all() for i, b in enumerate(back))


def test_damage_on_disk_is_an_error_and_everything_else_is_still_right(tmp_path):
    pool = made(tmp_path, LARGE, slots=2)
    lease, data = filled(pool, 160)
    (file,) = tmp_path.glob("spill/spill-*/data.mdb")
    place = pool._spill._places[int(lease.table[0])]  # of layer 0
    with file.open("r+b") as handle:
        handle.seek(place.page * 4096 + 16 + 5000)
        handle.write(b"damage")
    for ids in ([[0], [0]], [[0, 20], [40, 0]]):  # one reader, several readers
        with pytest.raises(CorruptRecord, match="is not what was written there"):
            lease.gather(0, torch.tensor(ids))
    assert right(lease, 0, all_ids(pool, 160)[:, 16:], data)
    assert right(lease, 1, all_ids(pool, 160), data)
    lease.close()
    again, data = filled(pool, 16)
    assert right(again, 0, all_ids(pool, 16), data)
    again.close()
    pool.close()


def test_a_file_that_was_cut_short_is_an_error(tmp_path):
    with closing(Spill(tmp_path, 1 << 20)) as spill:
        values = [np.full(50_000, i, np.uint8) for i in range(3)]
        spill.write(list(enumerate(values)))
        os.truncate(spill.folder / "data.mdb", 4096 * spill._places[2].page + 100)
        out = [np.empty(50_000, np.uint8) for _ in values]
        for wanted in ([2], [0, 1, 2]):
            with pytest.raises(StoreError, match="was cut short: block 2 is lost"):
                spill.read([(i, out[i]) for i in wanted])
        assert all((out[i] == i).all() for i in range(2))


def test_after_an_error_no_reader_still_writes_to_the_buffers(tmp_path, monkeypatch):
    finished = []

    def fetch(spill, number, out):
        if number == 0:
            raise CorruptRecord("block 0")
        threading.Event().wait(0.1)  # a slow disk
        finished.append(number)

    monkeypatch.setattr(Spill, "_fetch", fetch)
    with closing(Spill(tmp_path, 1 << 20)) as spill:
        with pytest.raises(CorruptRecord):
            spill.read([(i, np.empty(4, np.uint8)) for i in range(3)])
        assert sorted(finished) == [1, 2]


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    pool = made(tmp_path, LARGE, slots=2)
    lease, data = filled(pool, 32)
    failed, other = pool.lease(), pool.lease()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"lower spill_bytes, or choose another spill_path"):
            fill(failed, pool, 32, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for layer in range(2):
        assert right(lease, layer, all_ids(pool, 32), data)
    more = fill(other, pool, 32, seed=2)
    assert right(other, 0, all_ids(pool, 32), more)
    assert right(lease, 0, all_ids(pool, 32), data)
    for each in (lease, failed, other):
        each.close()
    pool.close()


def test_the_folder_is_private_and_goes_when_the_pool_is_closed(tmp_path):
    pool = made(tmp_path / "a" / "b")
    (folder,) = tmp_path.glob("a/b/spill/spill-*/")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o077 for p in folder.iterdir()} == {0}
    pool.close()
    pool.close()
    assert not folder.exists()


def test_folders_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from kvstore.spill import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20)
print(spill.folder, flush=True)
sys.stdin.readline()
os._exit(1)
"""
    run = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(run, stdin=pipe, stdout=pipe, text=True) as child:
        theirs = Path(child.stdout.readline().strip())
        (tmp_path / "spill-of-a-user").mkdir()
        with closing(Spill(tmp_path, 1 << 20)) as ours, closing(Spill(tmp_path, 1 << 20)):
            assert theirs.is_dir()
            child.communicate("\n")
            assert theirs.is_dir()
            with closing(Spill(tmp_path, 1 << 20)):
                assert not theirs.exists()
                assert ours.folder.is_dir()
    assert (tmp_path / "spill-of-a-user").is_dir()


def test_a_process_that_ends_leaves_nothing_even_if_it_forked_and_closed_nothing(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from kvstore.errors import StoreError
from kvstore.spill import Spill
spill = Spill(Path({str(tmp_path)!r}), 1 << 20)
pid = os.fork()
if pid == 0:
    try:
        spill.write([])
    except StoreError as error:
        print(error)
    sys.exit(0)
os.waitpid(pid, 0)
print(spill.folder.is_dir())
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    lines = out.stdout.splitlines()
    assert lines == ["the spill was opened before a fork: open one in the child", "True"], (
        out.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["spill.lock"]


def test_a_path_that_cannot_be_used_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose another spill_path"):
        Spill(tmp_path / "file", 1 << 20)
