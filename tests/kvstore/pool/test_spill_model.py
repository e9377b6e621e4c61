"""Any sequence of operations on leases of a pool that spills, against plain tensors."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.errors import PoolFull
from tests.kvstore.pool.spilling import LARGE, SMALL, all_ids, made, numbers, right


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
TestPoolAgainstTensors.settings = settings(stateful_step_count=30)
