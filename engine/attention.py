"""Grouped-query attention: a chunk of a prompt, or one token over all or a part of its context."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from engine.kernels import attend_past
from engine.kernels.attend_token import Partial, attend_token_native, serves
from engine.model.pieces import AttentionSpec
from retrieval.capped import capped

FUSED = (torch.bfloat16, torch.float16)  # what FlashAttention takes
MASK_ELEMENTS = 1 << 24  # a mask of at most 64 MiB in fp32, however long the context
_SETTING = threading.Lock()


def attend_chunk(
    q: Float[Tensor, "Hq N D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq N D"]:
    """Attention of the last N of S tokens, each seeing itself and its past.

    `q` and `k` are rotated. Memory beyond inputs and output is bounded: queries are taken in
    runs whose mask (or, with a softcap, whose scores) stay below `MASK_ELEMENTS`, where no kernel
    goes without.
    """
    if attend_past.serves(q, k, v):
        positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1])
        return attend_past.attend_past_native(q, k, v, positions, spec)
    n, s = q.shape[1], k.shape[1]
    if spec.softcap is None and (spec.window is None or s <= spec.window):
        if q.is_cpu and all(x.stride(-1) == 1 for x in (q, k, v)):
            return attend_chunk_split(q, k, v, spec)
        if q.is_cuda and q.dtype in FUSED:
            return attend_chunk_fused(q, k, v, spec)
    scores = 1 if spec.softcap is None else q.shape[0]  # held for every head where they are capped
    run = max(16, MASK_ELEMENTS // (s * scores))
    return torch.cat([_attend_run(q, k, v, spec, i, min(i + run, n)) for i in range(0, n, run)], 1)


def attend_chunk_fused(
    q: Float[Tensor, "Hq N D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq N D"]:
    """`attend_chunk` without a window or softcap, its mask a rule that FlashAttention knows."""
    rule = causal_lower_right(q.shape[1], k.shape[1])
    return sdpa(q[None], k[None], v[None], attn_mask=rule, scale=spec.scale, enable_gqa=True)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, on a GPU without cuDNN."""
    with without_cudnn() if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **given)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Whatever else torch may take. One thread at a time, as it is a setting of all.

    Torch prefers cuDNN on Hopper and Blackwell. It compiles for every length that is new, which
    takes many steps' time, and is wrong on a B200 for few KV heads (pytorch #193893).
    """
    cuda = torch.backends.cuda
    with _SETTING:
        before = cuda.cudnn_sdp_enabled()
        cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            cuda.enable_cudnn_sdp(before)


def attend_chunk_split(
    q: Float[Tensor, "Hq N D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq N D"]:
    """`attend_chunk` without a window or softcap on a CPU: the chunk itself, and what is before it.

    Neither needs a mask, and before the chunk the queries of a KV head share its keys. Merged by
    their sums of exponentials, which torch says only below `F.scaled_dot_product_attention`; there
    it takes for granted that numbers of a token lie side by side.
    """
    past, rows = k.shape[1] - q.shape[1], q.unflatten(0, (len(k), -1))
    keys, values = k[:, None], v[:, None]

    def attend(queries: Tensor, *seen: Tensor, is_causal: bool) -> Partial:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(queries, *seen, is_causal=is_causal, scale=spec.scale)
        return Partial(out.reshape(q.shape), lse.reshape(q.shape[:2]))

    inside = (x[:, :, past:].expand(-1, rows.shape[1], -1, -1) for x in (keys, values))
    own = attend(rows, *inside, is_causal=True)
    if not past:
        return own.out
    folded = rows.flatten(1, 2)[:, None]
    before = attend(folded, keys[:, :, :past], values[:, :, :past], is_causal=False)
    return merge([own, before]).out


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, start: int, stop: int
) -> Tensor:
    """Queries [start, stop) of the N last tokens over the keys that any of them may see."""
    past = k.shape[1] - q.shape[1]
    first = 0 if spec.window is None else max(0, past + start - spec.window + 1)
    keys = slice(first, past + stop)
    mask = _visible(past + start, past + stop, first, spec.window, q.device)
    return grouped(q[:, start:stop], k[:, keys], v[:, keys], spec, mask)


def _visible(
    start: int, stop: int, first: int, window: int | None, device: torch.device
) -> Bool[Tensor, "N S"]:
    """True where query position i in [start, stop) sees key position j in [first, stop)."""
    i = torch.arange(start, stop, device=device)[:, None]
    j = torch.arange(first, stop, device=device)
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def attend_token(
    q: Float[Tensor, "Hq D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq D"]:
    """Attention of the newest of S tokens: in compiled code on a CPU that can, else in torch."""
    if spec.window is not None:
        k, v = k[:, -spec.window :], v[:, -spec.window :]
    if serves(q, k, v):
        return attend_token_native(q, k, v, spec.scale, spec.softcap).out
    return attend_token_torch(q, k, v, spec)


def attend_part(
    q: Float[Tensor, "Hq D"],
    k: Float[Tensor, "Hk K D"],
    v: Float[Tensor, "Hk K D"],
    spec: AttentionSpec,
) -> Partial:
    """Attention of one token over some tokens, and what it takes to merge it with the others.

    The spec's window is the caller's business: all of `k` is attended to.
    """
    if serves(q, k, v):
        return attend_token_native(q, k, v, spec.scale, spec.softcap)
    scores = attend_scores(q, k, spec)
    out = scores.softmax(-1) @ v.float()
    return Partial(out.flatten(0, 1).to(q.dtype), scores.logsumexp(-1).flatten())


def attend_scores(
    q: Float[Tensor, "Hq D"], k: Float[Tensor, "Hk K D"], spec: AttentionSpec
) -> Float[Tensor, "Hk G K"]:
    """What attention takes the softmax of, in fp32."""
    scores = (q.unflatten(0, (k.shape[0], -1)).float() @ k.float().mT) * spec.scale
    return capped(scores, spec.softcap)


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over all tokens from that over disjoint parts of them, on whatever device each was,
    of one query a head or many.

    Softmax is a weighted mean, so parts average by their shares of the sum of exponentials.
    """
    lses = torch.stack([part.lse for part in parts])
    lse = lses.logsumexp(0)
    outs = torch.stack([part.out.to(lse.dtype) for part in parts])
    out = ((lses - lse).exp()[..., None] * outs).sum(0)
    return Partial(out.to(parts[0].out.dtype), lse)


def attend_token_torch(
    q: Float[Tensor, "Hq D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
) -> Float[Tensor, "Hq D"]:
    """One token over all of `k`. The definition.

    The G queries that share a KV head are folded into the query-length axis, so that no key is
    copied or read twice: 14 ms for 32k tokens of 8 KV heads in bf16 on two AVX2 cores, where
    one matrix product per head takes 43-250 ms and `enable_gqa` 178 ms.
    """
    folded = q.unflatten(0, (k.shape[0], -1))  # [Hk, G, D]
    if spec.softcap is not None:
        return _softcapped(folded, k, v, spec, None).flatten(0, 1)
    return sdpa(folded[None], k[None], v[None], scale=spec.scale)[0].flatten(0, 1)


def grouped(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor
) -> Float[Tensor, "Hq N D"]:
    """KV heads as the batch and their queries as heads: keys are expanded by stride, not copied.

    Args:
        mask: of every head: what is seen, or what is added to scores.
    """
    hk, (hq, n, d) = k.shape[0], q.shape
    if spec.softcap is not None:
        rows = _softcapped(q.reshape(hk, -1, d), k, v, spec, mask.repeat(hq // hk, 1))
        return rows.reshape(hq, n, d)
    k, v = (x[:, None].expand(-1, hq // hk, -1, -1) for x in (k, v))
    out = sdpa(q.unflatten(0, (hk, -1)), k, v, attn_mask=mask, scale=spec.scale)
    return out.flatten(0, 1)


def _softcapped(
    q: Float[Tensor, "Hk M D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S D"],
    spec: AttentionSpec,
    mask: Bool[Tensor, "M S"] | Float[Tensor, "M S"] | None,
) -> Float[Tensor, "Hk M D"]:
    """Attention whose scores are capped before the softmax, as no kernel of torch's does it."""
    scores = capped((q.float() @ k.float().mT) * spec.scale, spec.softcap)
    if mask is not None:
        seen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if seen else scores + mask
    return (scores.softmax(-1) @ v.float()).to(q.dtype)
