"""Pools that overflow to disk: every token comes back, in bounded memory, or an error says why."""

import threading
from contextlib import closing

import pytest
import torch

from kvstore.errors import PoolFull, StoreError
from kvstore.pool.pinned import PinnedTier
from kvstore.pool.pool import Pool
from kvstore.pool.spill import Spill
from tests.kvstore.pool.spilling import (
    LARGE,
    SMALL,
    all_ids,
    disk_bytes,
    filled,
    made,
    numbers,
    right,
    shaped,
)


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
    for blocks, said in ((3, "spill_bytes .* holds 3 blocks"), (0, "a spill of .* spill_bytes")):
        spill = Spill(tmp_path, disk_bytes(LARGE, blocks) + 1)
        with closing(spill), pytest.raises(PoolFull, match=said):
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
