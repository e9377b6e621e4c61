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
from native.pages import own_pages

MODEL = ModelIdentity(b"soak", (), "{}", "bfloat16", 16, 4, 128, "{}")
SIZE = 64  # tokens: a block of 2 MiB
LONGEST = 32  # blocks of a conversation
LIVE = 4096  # conversations that may be asked for, by popularity
FORGET = 0.02  # chance that one is replaced by another when it is asked for
TEMPLATES = 8
MARK = 16  # numbers of two bytes: a digest


class Churn:
    """Asks a store for conversations, checks what it gets and puts what it does not.

    Content follows from a block's digest, so that nothing of what was written need be kept. Every
    thread has one KV cache, as a loop that decodes has: what is found is read into it, what is not
    is written there and put from there.
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
        number, cache = 0, _cache()
        while not tier.evictions:
            keys = self._keys(number % LIVE, number // LIVE)
            self._put(keys, cache)
            number += 1
            if number % 16 == 0:
                self._store.flush()
                tier = self._store.stats().tiers["disk"]
        return number

    def run(self, stop: threading.Event, rate: float, number: int) -> None:
        """Ask for `rate` conversations a second until `stop`; what fails ends it."""
        dice, cache = random.Random(1000 * self._seed + number), _cache()
        due = time.monotonic()
        try:
            while not stop.is_set():
                self._ask(dice, cache)
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

    def _ask(self, dice: random.Random, cache: Tensor) -> None:
        [rank] = dice.choices(range(LIVE), cum_weights=self._weights)
        with self._lock:
            self._versions[rank] += dice.random() < FORGET
            version = self._versions[rank]
        keys = self._keys(rank, version)
        with self._store.pin(keys):
            found = self._store.lookup(keys)
            self._read(keys[:found], cache)
        self._put(keys[found:], cache, above=keys[:found])

    def _keys(self, rank: int, version: int) -> list[BlockKey]:
        length = random.Random(rank).randint(1, LONGEST)
        tokens = [rank, version, *([0] * (length * SIZE - 2))]
        return BlockKey.chain(tokens, identity=MODEL, tenant=b"soak", size=SIZE)

    def _read(self, keys: Sequence[BlockKey], cache: Tensor) -> None:
        if not keys:
            return
        out = cache[: len(keys)]
        began = time.perf_counter()
        there = self._store.read_many(keys, range(MODEL.num_layers), out)
        seconds = time.perf_counter() - began
        wrong = sum(
            is_ and not self._is_content(row, key)
            for key, is_, row in zip(keys, there, out, strict=True)
        )
        with self._lock:
            self._times.append(seconds / len(keys))
            self.blocks_read += sum(there)
            self.wrong += wrong

    def _put(self, keys: Sequence[BlockKey], cache: Tensor, above: Sequence[BlockKey] = ()) -> None:
        items = [(key, KVBlock(row)) for key, row in zip(keys, cache, strict=False)]
        for key, block in items:
            numbers = block.data.view(torch.int16)
            numbers.copy_(self._template(key))[..., :MARK] = _mark(key)
        with self._store.pin([*above, *keys]):
            self._store.put(items)
        with self._lock:
            self.blocks_put += len(keys)

    def _template(self, key: BlockKey) -> Tensor:
        return self._templates[key.digest[0] % TEMPLATES]

    def _is_content(self, row: Float[Tensor, "L 2 Hk P D"], key: BlockKey) -> bool:
        """Whether it is the block's template, with the block's mark at the start of every row."""
        numbers = row.view(torch.int16)
        marked = bool((numbers[..., :MARK] == _mark(key)).all())
        return marked and torch.equal(numbers[..., MARK:], self._template(key)[..., MARK:])


def _cache() -> Tensor:
    """Room for the longest conversation."""
    return own_pages((LONGEST, *MODEL.block_shape(SIZE)), torch.bfloat16)


def _mark(key: BlockKey) -> Tensor:
    return torch.frombuffer(bytearray(key.digest), dtype=torch.int16)
