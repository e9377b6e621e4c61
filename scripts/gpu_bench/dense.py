"""Dense decode of a batch: the fastest attention that torch has, in one CUDA graph."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.model.pieces import Model
from engine.model.rope import Tables
from gpu_bench.timing import time_calls

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # q [B Hq D], k, v [B Hk T D]


def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA that knows of groups."""
    asked = q[:, :, None]
    return F.scaled_dot_product_attention(asked, k, v, scale=scale, enable_gqa=True)[:, :, 0]


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The queries of a KV head as rows: each key is read once."""
    folded = q.unflatten(1, (k.shape[1], -1))
    return F.scaled_dot_product_attention(folded, k, v, scale=scale).flatten(1, 2)


def by_flash(way: Attention) -> Attention:
    """A way of SDPA's by FlashAttention, which splits long contexts over processors.

    By itself torch takes cuDNN first, on Hopper.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return way(q, k, v, scale)

    return attend


def matmul(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Two batched matrix products."""
    folded = q.unflatten(1, (k.shape[1], -1))
    weights = (folded @ k.mT * scale).float().softmax(-1).to(v.dtype)
    return (weights @ v).flatten(1, 2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The package of that name, which splits long contexts over processors."""
    found = importlib.import_module("flash_attn").flash_attn_with_kvcache(
        q[:, None], k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale
    )
    return found[:, 0]


WAYS: Mapping[str, Attention] = {
    "SDPA, groups": sdpa_grouped,
    "SDPA, folded groups": sdpa_folded,
    "FlashAttention, groups": by_flash(sdpa_grouped),
    "FlashAttention, folded groups": by_flash(sdpa_folded),
    "grouped matmul": matmul,
    "flash_attn": flash_attn,
}


def fastest(k: Tensor, v: Tensor, group: int) -> tuple[str, dict[str, Any]]:
    """The way that takes the least time on these keys, and the times or faults of all."""
    q = torch.randn(len(k), k.shape[1] * group, k.shape[3], dtype=k.dtype, device=k.device)
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            times = time_calls([partial(way, q, k, v, k.shape[3] ** -0.5)], k.device, rounds=5)
            found[name] = times.median_s if times else 0.0
        except Exception as error:  # a backend that is not there is no reason to end
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    able = {name: s for name, s in found.items() if isinstance(s, float)}
    return min(able, key=able.__getitem__), found


class DenseBatch:
    """`slots` requests of `length` tokens each, with random KV, attended to whole.

    A step writes its token behind the others and reads all; steps do not move on, so each does the
    work of one at this length.
    """

    def __init__(self, model: Model, slots: int, length: int) -> None:
        s = model.shape
        size = (s.num_layers, slots, s.num_kv_heads, length + 1, s.head_dim)
        self.k, self.v = (
            torch.empty(size, dtype=s.dtype, device=s.device).normal_() for _ in range(2)
        )
        self.model, self.length = model, length
        self.way, self.ways = fastest(self.k[0], self.v[0], s.num_heads // s.num_kv_heads)
        self._positions = torch.full((slots,), length, device=s.device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=s.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits of one token for each request; the second call captures, later ones replay."""
        self._tokens.copy_(tokens)
        if self._graph is not None:
            self._graph.replay()
        elif self._logits is not None and tokens.is_cuda:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._run()
            self._graph.replay()
        else:
            self._logits = self._run()
        assert self._logits is not None
        return self._logits

    def _run(self) -> Tensor:
        model, x = self.model, self.model.embed(self._tokens)
        tables, attend = Tables(self._positions), WAYS[self.way]
        for i, layer in enumerate(model.layers):
            q, k, v = layer.qkv(x)
            table = tables[layer.rope]
            self.k[i, :, :, self.length] = layer.rope.rotate(k, table).transpose(0, 1)
            self.v[i, :, :, self.length] = v.transpose(0, 1)
            turned = layer.rope.rotate(q, table).transpose(0, 1).contiguous()
            heads = attend(turned, self.k[i], self.v[i], layer.attention.scale)
            x = layer.finish(x, heads.transpose(0, 1))
        return model.logits(x)
