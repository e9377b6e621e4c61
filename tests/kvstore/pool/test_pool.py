"""Pools of rows: what leases write is what they read, within a budget, and nobody else's."""

import threading
from itertools import pairwise

import pytest
import torch

from kvstore.errors import PoolFull, StoreError
from kvstore.pool.device import DeviceTier
from kvstore.pool.pinned import PinnedTier, lock_pages
from kvstore.pool.pool import Pool
from kvstore.rows import Int4, Int8, PoolShape, Raw, RowLayout

BF16 = Raw(torch.bfloat16)


def shaped(heads=2, dim=64, layers=2, k=BF16, v=BF16, tokens=8):
    return PoolShape(layers, heads, RowLayout(k, v, dim, torch.bfloat16), tokens)


def made(shape, blocks=64, **more):
    return Pool(shape, blocks * shape.block_bytes, **more)


def numbers(shape, count, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    size = (2, shape.num_kv_heads, count, shape.layout.head_dim)
    return torch.randn(size, generator=generator).bfloat16().to(device).unbind()


def ids_of(heads, count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator)[:count] for _ in range(heads)])


def written(pool, count, seed=0, step=None):
    """A lease with `count` tokens in every layer, and these, [layer][k, v]."""
    lease = pool.lease()
    lease.reserve(count)
    all_kv = [numbers(pool.shape, count, 10 * seed + i) for i in range(pool.shape.num_layers)]
    for layer, (k, v) in enumerate(all_kv):
        for lo in range(0, count, step or count):
            hi = min(count, lo + (step or count))
            lease.write(layer, lo, k[:, lo:hi], v[:, lo:hi])
    return lease, all_kv


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("count", [1, 127, 300])
@pytest.mark.parametrize("step", [None, 1, 13])
def test_chosen_and_contiguous_tokens_are_those_that_were_written(heads, dim, count, step):
    pool = made(shaped(heads, dim))
    first, _ = written(pool, 9, seed=7)
    lease, all_kv = written(pool, count, step=step)
    first.close()
    for layer, (k, v) in enumerate(all_kv):
        ids = ids_of(heads, min(count, 50), count)
        got = lease.gather(layer, ids)
        for head in range(heads):
            assert torch.equal(got.k[head], k[head, ids[head]])
            assert torch.equal(got.v[head], v[head, ids[head]])
        lo, hi = count // 3, count - count // 5
        got = lease.read(layer, lo, hi)
        assert torch.equal(got.k, k[:, lo:hi])
        assert torch.equal(got.v, v[:, lo:hi])


@pytest.mark.parametrize(
    ("k", "v"), [(None, BF16), (Int8(), Int4()), (BF16, Int4()), (None, Int8())]
)
def test_codecs_see_whole_rows_wherever_blocks_lie(k, v):
    pool = made(shaped(dim=80, k=k, v=v))
    lease, all_kv = written(pool, 100, step=7)
    layout = pool.shape.layout
    ids = ids_of(2, 40, 100)
    for layer, (keys, values) in enumerate(all_kv):
        picked = [torch.stack([x[h, ids[h]] for h in range(2)]) for x in (keys, values)]
        want, got = layout.decode(layout.encode(*picked)), lease.gather(layer, ids)
        assert torch.equal(got.v, want.v)
        assert (got.k is None) if k is None else torch.equal(got.k, want.k)


def test_a_batch_is_one_read_of_the_flat_slab():
    pool = made(shaped())
    batch = [written(pool, count, seed=count) for count in (5, 64, 200)]
    wanted = [ids_of(2, 5, lease.reserved - 8 + 5) % lease.written(1) for lease, _ in batch]
    rows = torch.cat([lease.rows(ids) for (lease, _), ids in zip(batch, wanted)], 1)
    flat = pool.flat(1).index_select(0, rows.view(-1)).view(*rows.shape, -1)
    got = pool.shape.layout.decode(flat).v.split(5, 1)
    for (lease, _), ids, v in zip(batch, wanted, got):
        assert torch.equal(v, lease.gather(1, ids).v)


def test_a_kernel_finds_k_and_v_in_the_slab_by_pointer():
    pool = made(shaped(heads=2, dim=64))
    lease, all_kv = written(pool, 30)
    slab, layout = pool.slab(1), pool.shape.layout
    assert slab.is_contiguous()
    assert slab.data_ptr() == pool.flat(1).data_ptr()
    (row,) = lease.rows(torch.tensor([[29], [29]]))[1]
    line = slab.view(-1)[row * layout.row_bytes :][: layout.row_bytes]
    for at, x in ((layout.k_at, all_kv[1][0]), (layout.v_at, all_kv[1][1])):
        assert torch.equal(line[at : at + 128].view(torch.bfloat16), x[1, 29])
    block = lease.table[29 // 8]
    assert torch.equal(slab[block, 1, 29 % 8], line)


def test_ids_may_repeat_be_narrow_broadcast_or_none():
    pool = made(shaped())
    lease, all_kv = written(pool, 20)
    same = torch.tensor([3, 3, 19], dtype=torch.int32).expand(2, -1)
    assert torch.equal(lease.gather(0, same).k, all_kv[0][0][:, [3, 3, 19]])
    assert lease.gather(0, torch.empty(2, 0, dtype=torch.long)).v.shape == (2, 0, 64)
    assert lease.read(0, 5, 5).v.shape == (2, 0, 64)
    with lease.held(0, same) as rows:
        assert torch.equal(rows, lease.rows(same))


def test_tokens_may_be_written_again_but_not_past_a_gap_or_the_reserve():
    pool = made(shaped())
    lease, all_kv = written(pool, 20)
    k, v = numbers(pool.shape, 6, seed=5)
    lease.write(0, 10, k, v)
    assert lease.written(0) == 20
    assert torch.equal(lease.read(0, 10, 16).k, k)
    assert torch.equal(lease.read(0, 16, 20).k, all_kv[0][0][:, 16:])
    with pytest.raises(ValueError, match="must follow the 20 written, within the 24 reserved"):
        lease.write(0, 21, k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="within the 24 reserved"):
        lease.write(0, 20, k, v)


def test_what_is_not_written_cannot_be_read_even_if_another_request_left_it():
    pool = made(shaped(), blocks=3)
    written(pool, 24)[0].close()
    lease, _ = written(pool, 5)
    for ids in ([[0, 5], [0, 1]], [[0, 1], [0, -1]], [[0, 1], [0, 400]]):
        with pytest.raises(ValueError, match="5 written"):
            lease.gather(0, torch.tensor(ids))
        with pytest.raises(ValueError, match="5 written"), lease.held(0, torch.tensor(ids)):
            pass
    with pytest.raises(ValueError):
        lease.read(1, 0, 6)


def test_blocks_are_taken_as_tokens_need_them_and_given_back_once():
    pool = made(shaped(tokens=8), blocks=5)
    lease = pool.lease()
    for tokens, blocks in ((0, 0), (1, 1), (8, 1), (9, 2), (3, 2), (40, 5)):
        lease.reserve(tokens)
        assert len(lease.table) == blocks
        assert pool.free_blocks == 5 - blocks
        assert lease.nbytes == pool.used_bytes == blocks * pool.shape.block_bytes
    assert sorted(lease.table.tolist()) == list(range(5))
    lease.close()
    lease.close()
    assert (pool.free_blocks, pool.used_bytes) == (5, 0)
    with pytest.raises(StoreError, match="lease 1 is closed"):
        lease.reserve(1)
    with pytest.raises(StoreError, match="closed"):
        lease.rows(torch.zeros(2, 1, dtype=torch.long))
    with pool.lease() as again:
        again.reserve(40)
    assert pool.free_blocks == 5


def test_a_pool_without_room_says_which_setting_to_raise_and_takes_nothing():
    shape = shaped(tokens=8)
    pool = DeviceTier(shape, 3 * shape.block_bytes)
    lease = pool.lease("request 9")
    lease.reserve(16)
    with pytest.raises(
        PoolFull, match=r"device pool full: 2 more .* 1 of 3 free.* raise device_bytes"
    ):
        lease.reserve(32)
    assert pool.free_blocks == 1
    lease.reserve(24)


@pytest.mark.parametrize(
    ("tier", "setting"),
    [(Pool, "capacity_bytes"), (DeviceTier, "device_bytes"), (PinnedTier, "pinned_bytes")],
)
def test_a_budget_that_no_block_or_no_machine_fits_fails_at_once(tier, setting):
    shape = shaped()
    with pytest.raises(PoolFull, match=f"raise {setting}"):
        tier(shape, shape.block_bytes - 1)
    with pytest.raises(PoolFull, match=f"lower {setting}"):
        tier(shape, 1 << 60)


def test_the_memory_is_the_budget_and_none_of_it_is_touched_before_use():
    shape = shaped(heads=8, dim=128, layers=2, tokens=64)
    before = resident_bytes()
    pool = PinnedTier(shape, 256 << 20)
    assert pool.nbytes == 256 << 20
    lease = pool.lease()
    lease.reserve(32_000)
    assert resident_bytes() - before < 32 << 20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_pool_with_open_leases_does_not_close_and_names_them():
    pool = made(shaped())
    first, second = pool.lease("request 4"), pool.lease()
    with pytest.raises(StoreError, match="open leases: request 4, lease 2"):
        pool.close()
    first.close()
    second.close()
    pool.close()
    assert (pool.nbytes, pool.used_bytes) == (0, 0)


def test_rows_are_moved_bit_by_bit_whatever_numbers_they_would_be():
    shape = shaped(k=Raw(torch.float32), v=Raw(torch.float32))
    pool = Pool(shape, 4 * shape.block_bytes)
    bits = torch.arange(0, 2**32, 2**24 + 3)[:256].view(2, 2, 64).to(torch.int32)  # NaNs, too
    with pool.lease() as lease:
        lease.reserve(2)
        lease.write(0, 0, bits.view(torch.float32), bits.view(torch.float32))
        rows = pool.flat(0).index_select(0, lease.rows(torch.tensor([[0, 1]] * 2)).view(-1))
        assert torch.equal(rows[:, :256].view(torch.int32), bits.view(4, 64))


def test_an_error_in_a_write_leaves_the_pool_usable():
    pool = made(shaped())
    lease, all_kv = written(pool, 10)
    k, v = numbers(shaped(heads=3), 2)
    with pytest.raises((RuntimeError, IndexError)):
        lease.write(0, 10, k, v)
    assert lease.written(0) == 10
    assert torch.equal(lease.read(0, 0, 10).k, all_kv[0][0])


@pytest.mark.parametrize(
    ("lo", "hi"), [(0, 64), (0, 5), (3, 8), (5, 61), (16, 48), (8, 23), (63, 64)]
)
def test_rows_from_another_device_land_where_all_others_do(lo, hi):
    """As they are sent block by block: here from this device, as if it were another."""
    shape = shaped(layers=1)
    plain, sent = made(shape), made(shape)
    k, v = numbers(shape, 64)
    for pool in (plain, sent):
        lease, other = pool.lease(), pool.lease()
        for tokens in (8, 24, 32, 64):  # blocks that lie side by side, and some that do not
            lease.reserve(tokens)
            other.reserve(tokens // 2)
        lease.write(0, 0, torch.zeros_like(k), torch.zeros_like(v))
        if pool is plain:
            lease.write(0, lo, k[:, lo:hi], v[:, lo:hi])
        else:
            lease._send(0, lo, shape.layout.encode(k[:, lo:hi], v[:, lo:hi]))
    taken = lease.table.tolist()
    assert any(a + 1 == b for a, b in pairwise(taken))
    assert any(a + 1 != b for a, b in pairwise(taken))
    assert torch.equal(plain.slab(0)[taken], sent.slab(0)[taken])


def test_pages_that_cannot_be_locked_leave_no_error_behind(monkeypatch):
    """CUDA keeps it for the next launch to report, which may be another request's."""
    absorbed = []

    class Refuses:
        def cudaHostRegister(self, *_):
            return 2

    def launched(*_, **__):
        absorbed.append(True)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", Refuses)
    page = torch.empty(4096, dtype=torch.uint8)
    monkeypatch.setattr(torch, "zeros", launched)
    with pytest.raises(PoolFull, match="lower pinned_bytes"):
        lock_pages(page, "a test", "pinned_bytes")
    assert absorbed


@pytest.mark.gpu
@pytest.mark.parametrize("codec", [BF16, Int8(), Int4()])
def test_what_a_gpu_sends_is_there_when_it_is_read(codec):
    shape = shaped(heads=8, dim=128, layers=1, k=codec, v=codec, tokens=64)
    pool = PinnedTier(shape, 512 * shape.block_bytes, locked=True)
    count = 312 * 64  # a part of a block is copied at once, and all that was sent before
    k, v = numbers(shape, count)
    with pool.lease() as lease:
        lease.reserve(count)
        lease.write(0, 0, k.cuda(), v.cuda())
        got = lease.read(0, 0, count)
    torch.testing.assert_close(got.k, shape.layout.decode(shape.layout.encode(k, v)).k)
    torch.testing.assert_close(got.v, shape.layout.decode(shape.layout.encode(k, v)).v)


@pytest.mark.gpu
def test_blocks_are_given_back_when_what_a_gpu_sent_is_there():
    shape = shaped(layers=1, tokens=64)
    pool = PinnedTier(shape, 8 * shape.block_bytes, locked=True)
    k, v = (x.cuda() for x in numbers(shape, 512))
    with pool.lease() as lease:
        lease.reserve(512)
        torch.cuda._sleep(1 << 28)  # a tenth of a second or so
        lease.write(0, 0, k, v)
    pool.slab(0).zero_()  # who has them next
    torch.cuda.synchronize()
    assert not pool.slab(0).any()


def test_threads_share_a_pool_without_sharing_blocks():
    pool = made(shaped(), blocks=40)
    wrong = []

    def work(seed):
        for i in range(30):
            count = 1 + (7 * i + 13 * seed) % 150
            lease, all_kv = written(pool, count, seed=seed, step=31)
            for layer, (k, v) in enumerate(all_kv):
                got = lease.read(layer, 0, count)
                if not (torch.equal(got.k, k) and torch.equal(got.v, v)):
                    wrong.append((seed, i))
            lease.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.free_blocks == 40


def test_a_device_tier_on_the_cpu_reads_what_was_written():
    read_back_on("cpu")


@pytest.mark.gpu
def test_a_device_tier_on_a_gpu_reads_what_was_written():
    read_back_on("cuda")


def read_back_on(device):
    shape = shaped(heads=4, dim=128)
    pool = DeviceTier(shape, 64 * shape.block_bytes, device=device)
    lease = pool.lease()
    lease.reserve(300)
    k, v = numbers(shape, 300, device=device)
    lease.write(0, 0, k, v)
    ids = ids_of(4, 100, 300).to(device)
    got = lease.gather(0, ids)
    assert got.k.device.type == device
    heads = torch.arange(4, device=device)[:, None]
    assert torch.equal(got.k, k[heads, ids])
    assert torch.equal(got.v, v[heads, ids])


@pytest.mark.gpu
def test_a_pinned_tier_is_page_locked_without_rounding_up():
    shape = shaped()
    pool = PinnedTier(shape, 65 * shape.block_bytes, locked=True)
    assert pool.slab(0).is_pinned()
    assert pool.nbytes == 65 * shape.block_bytes
