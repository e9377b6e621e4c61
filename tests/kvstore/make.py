"""Keys and blocks for tests. A block's bytes follow from its key, so any process can check them."""

import numpy as np
import torch

from kvstore.block import BlockKey, KVBlock
from kvstore.identity import ModelIdentity

SIZE = 4  # tokens per block


def identity(**changes) -> ModelIdentity:
    fields = {
        "weights": b"weights", "adapters": (), "rope": "{}", "dtype": "bfloat16", "num_layers": 3,
        "num_kv_heads": 2, "head_dim": 8, "attention": "{}",
    }  # fmt: skip
    return ModelIdentity(**(fields | changes))


def chain(tokens, *, model=None, tenant=b"tenant", size=SIZE, **of):
    return BlockKey.chain(
        list(tokens), identity=model or identity(), tenant=tenant, size=size, **of
    )


def content(key: BlockKey, model: ModelIdentity) -> torch.Tensor:
    """All bit patterns, NaN too: compare with `same`."""
    shape = model.block_shape(key.num_tokens)
    nbytes = int(np.prod(shape)) * model.torch_dtype.itemsize
    seed = int.from_bytes(key.digest[:8], "little")
    raw = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return torch.from_numpy(raw).view(model.torch_dtype).view(shape)


def items(keys, model=None):
    model = model or identity()
    return [(key, KVBlock(content(key, model))) for key in keys]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def right(block: KVBlock, key: BlockKey, model=None) -> bool:
    return same(block.data, content(key, model or identity()))
