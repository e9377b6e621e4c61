"""How much of a layer-wise load hides under computing layers, or they under it.

A prefix of 8,192 tokens, of 32 layers x 8 KV heads x 128 in bfloat16 (1 GiB), rests on disk only,
its pages not in the page cache. The engine's loader reads, verifies, rotates and places it, one
value of layers of every block at a time, while a loop waits for each layer and then computes: as
long in all as loading alone takes. It multiplies matrices with one thread of the CPU, which loading
needs, too; or, `elsewhere`, it sleeps, as a loop does whose layers a GPU computes. What the two
take from each other is measured, too: `apart`, they run beside each other and neither waits.

The share that is hidden is (load + compute - both together) / the smaller of the two, all three
measured in the same round. A loop that starts with nothing loaded can hide all but the layers of
the first value: values of 2 MiB hold one layer of 512 tokens here, and eight of 64 tokens.
"""

import statistics
import time
from pathlib import Path

import torch
from bench_common import timed
from transformers import LlamaConfig, LlamaForCausalLM

from engine.cache import SequenceCache
from engine.loading import Loader
from engine.model.hf import HFModel
from engine.staging import Placed
from kvstore.block import BlockKey, KVBlock
from kvstore.disk.environment import files_of
from kvstore.disk.tier import DiskTier
from kvstore.store import TieredStore
from store_bench.pages import drop
from store_bench.sides import MODEL

TOKENS, LAYERS = 8192, 32
SIZES = (512, 64)
ROUNDS = 9


def model() -> HFModel:
    """The shape of a model, with weights that nobody uses."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, vocab_size=64, max_position_embeddings=2 * TOKENS,
    )  # fmt: skip
    return HFModel(LlamaForCausalLM(config).to(torch.bfloat16).eval())


class Prefix:
    """One prefix in blocks of `size` tokens, on disk."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.model = folder / f"overlap{size}", model()
        keys = BlockKey.chain(range(TOKENS), identity=MODEL, tenant=b"bench", size=size)
        self.placed = [Placed(key, i * size) for i, key in enumerate(keys)]
        data = torch.randint(-(2**15), 2**15, MODEL.block_shape(size), dtype=torch.int16)
        tier = self._tier()
        tier.put([(key, KVBlock(data.view(torch.bfloat16))) for key in keys])
        tier.close()
        self.cache = SequenceCache(self.model.shape, TOKENS)
        for layer in range(LAYERS):
            self.cache.buffers(layer, TOKENS)
        self.matrix = torch.randn(512, 512)

    def _tier(self) -> DiskTier:
        return DiskTier(self.folder, 2 << 30)

    def layer(self) -> None:
        """What a layer is computed for."""
        time.sleep(self.sleep_s)
        for _ in range(self.products):
            self.matrix @ self.matrix

    def calibrate(self, load_s: float, *, elsewhere: bool) -> None:
        """Make computing all layers take as long as loading them."""
        self.sleep_s, self.products = 0.0, 100
        if elsewhere:
            self.sleep_s, self.products = load_s / LAYERS, 0
        else:
            self.products = max(1, round(load_s / LAYERS / timed(self.layer) * self.products))

    def run(self, computes: bool, *, waits: bool = True) -> float:
        drop(files_of(self.folder))
        with TieredStore([self._tier()]) as store:
            return timed(lambda: self._load(store, computes, waits))

    def _load(self, store: TieredStore, computes: bool, waits: bool) -> None:
        loader = Loader(self.model, self.cache, store, self.placed, TOKENS)
        for layer in range(LAYERS):
            if waits:
                loader.wait(layer)
            if computes:
                self.layer()
        loader.result()
        loader.cancel()

    def hidden(self) -> tuple[float, float]:
        """The share hidden in one round: by a loop that waits for its layers, and apart."""
        load_s = self.run(computes=False)
        compute_s = timed(lambda: [self.layer() for _ in range(LAYERS)])
        both_s = self.run(computes=True), self.run(computes=True, waits=False)
        pipelined, apart = ((load_s + compute_s - s) / min(load_s, compute_s) for s in both_s)
        return pipelined, apart


def overlap(folder: Path) -> dict[str, float]:
    """For each size of blocks, the median share."""
    shares = {}
    for size in SIZES:
        prefix = Prefix(folder, size)
        prefix.run(computes=False)  # memory is touched for the first time
        for name, elsewhere in ((f"hidden_{size}", False), (f"hidden_{size}_elsewhere", True)):
            prefix.calibrate(prefix.run(computes=False), elsewhere=elsewhere)
            rounds = [prefix.hidden() for _ in range(ROUNDS)]
            shares[name], shares[f"{name}_apart"] = map(
                statistics.median, zip(*rounds, strict=True)
            )
    return shares
