"""Conversations that come, grow, come again and are forgotten."""

import random
import threading
import time
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from kvstore.block import BlockKey, KVBlock
from kvstore.identity import ModelIdentity
from kvstore.store import TieredStore
from kvstore.tier import Item

MODEL = ModelIdentity(b"soak", (), "{}", "bfloat16", 16, 4, 128, "{}")
SIZE = 64  # tokens: a block of 2 MiB
LONGEST = 32  # blocks of a conversation
LIVE = 4096  # conversations that may be asked for, by popularity
FORGET = 0.02  # chance that one is replaced by another when it is asked for
TEMPLATES = 8


class Churn:
    """Asks a store for conversations, checks what it gets and puts what it does not.

    Content follows from a block's digest, so that nothing of what was written need be kept.
    """

    def __init__(self, store: TieredStore, seed: int) -> None:
        self.blocks_read = self.blocks_put = self.wrong = 0
        self._store, self._seed = store, seed
        self._lock = threading.Lock()  # guards all below, and the numbers above
        self._versions = [0] * LIVE
        self._times: list[float] = []
        self._failure: Exception | None = None
        self._weights = list(accumulate(1 / (rank + 1) for rank in range(LIVE)))
        generator = torch.Generator().manual_seed(seed)
        shape = MODEL.block_shape(SIZE)
        self._templates = [
            torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            for _ in range(TEMPLATES)
        ]

    def fill(self) -> int:
        """Put conversations until the slowest tier evicts; how many."""
        tier = self._store.stats().tiers["disk"]
        number = 0
        while not tier.evictions:
            keys = self._keys(number % LIVE, number // LIVE)
            self._put(keys)
            number += 1
            if number % 16 == 0:
                self._store.flush()
                tier = self._store.stats().tiers["disk"]
        return number

    def run(self, stop: threading.Event, rate: float, number: int) -> None:
        """Ask for `rate` conversations a second until `stop`; what fails ends it."""
        dice = random.Random(1000 * self._seed + number)
        due = time.monotonic()
        try:
            while not stop.is_set():
                self._ask(dice)
                due = max(due + dice.expovariate(rate), time.monotonic() - 1)
                stop.wait(max(0.0, due - time.monotonic()))
        except Exception as error:
            with self._lock:
                self._failure = error

    def taken(self) -> list[float]:
        """Seconds of the reads since the last call."""
        with self._lock:
            times, self._times = self._times, []
        return times

    def raise_failure(self) -> None:
        """Raise what ended a thread."""
        if self._failure is not None:
            raise self._failure

    def _ask(self, dice: random.Random) -> None:
        [rank] = dice.choices(range(LIVE), cum_weights=self._weights)
        with self._lock:
            self._versions[rank] += dice.random() < FORGET
            version = self._versions[rank]
        keys = self._keys(rank, version)
        with self._store.pin(keys):
            found = self._store.lookup(keys)
            self._read(keys[:found])
        self._put(keys[found:], above=keys[:found])

    def _keys(self, rank: int, version: int) -> list[BlockKey]:
        length = random.Random(rank).randint(1, LONGEST)
        tokens = [rank, version, *([0] * (length * SIZE - 2))]
        return BlockKey.chain(tokens, identity=MODEL, tenant=b"soak", size=SIZE)

    def _read(self, keys: Sequence[BlockKey]) -> None:
        if not keys:
            return
        out = torch.empty(len(keys), *MODEL.block_shape(SIZE), dtype=torch.bfloat16)
        began = time.perf_counter()
        there = self._store.read_many(keys, range(MODEL.num_layers), out)
        seconds = time.perf_counter() - began
        wrong = sum(
            is_ and not torch.equal(row.view(torch.int16), self._content(key))
            for key, is_, row in zip(keys, there, out, strict=True)
        )
        with self._lock:
            self._times.append(seconds / len(keys))
            self.blocks_read += sum(there)
            self.wrong += wrong

    def _put(self, keys: Sequence[BlockKey], above: Sequence[BlockKey] = ()) -> None:
        with self._store.pin([*above, *keys]):
            self._store.put([self._item(key) for key in keys])
        with self._lock:
            self.blocks_put += len(keys)

    def _item(self, key: BlockKey) -> Item:
        return key, KVBlock(self._content(key).view(torch.bfloat16))

    def _content(self, key: BlockKey) -> Float[Tensor, "L 2 Hk P D"] | Tensor:
        data = self._templates[key.digest[0] % TEMPLATES].clone()
        mark = torch.frombuffer(bytearray(key.digest), dtype=torch.int16)
        data[..., :16] = mark  # at the start of every row
        return data
