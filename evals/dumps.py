"""Queries, keys and values of a real model that reads a real text."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.attention import attend_chunk
from engine.cache import SequenceCache
from engine.demo.haystack import Haystack
from engine.engine import Engine
from engine.model.pieces import QKV, Model
from engine.model.rope import Rope, Tables
from engine.rag.question import prompt
from evals.trace import Space, Trace

FACTS = 8  # hidden in the text; the question is about the one in its middle
QUESTION_TOKENS = 64  # room for the question and the chat template


def haystack_tokens(engine: Engine, tokens: int, seed: int) -> Int[Tensor, " T"]:
    """Reference pages of the Python language with a few facts in them, and a question at the end.

    Args:
        tokens: in all at most; a few fewer.
    """
    room = tokens - QUESTION_TOKENS
    found = Haystack.build(engine.tokenizer, tokens=room, facts=FACTS, seed=seed)
    return torch.tensor(prompt(engine, found.text, found.facts[FACTS // 2].question))


@torch.no_grad()
def dump(
    model: Model,
    tokens: Int[Tensor, " T"],
    *,
    layers: Sequence[int],
    queries: int = 32,
    past: int = 128,
    distance: int = 2048,
    dtype: torch.dtype | None = None,
    chunk: int = 512,
) -> list[Trace]:
    """A trace of each of these layers: the last `queries` tokens ask, one after the other.

    The prompt is what comes before them, and the `past` queries are its last. Layers whose
    attention has a window or a softcap are traced as if they had none.

    Args:
        distance: of the windowed queries to all keys (A2ATS, 2025).
        dtype: that keys and values are kept in; None takes the model's.
    Raises:
        ValueError: if there are not more tokens than queries and past ones.
    """
    if len(tokens) <= queries + past:
        raise ValueError(
            f"need more than {queries} + {past} tokens, to ask and to learn from: got {len(tokens)}"
        )
    seen = _read(model, tokens, frozenset(layers), chunk)
    return [
        _trace(model, i, seen[i], queries, past, distance, dtype or model.shape.dtype)
        for i in layers
    ]


def _read(
    model: Model, tokens: Int[Tensor, " T"], layers: frozenset[int], chunk: int
) -> dict[int, QKV]:
    """Unrotated q, k and v of all tokens in these layers."""
    cache = SequenceCache(model.shape, len(tokens))
    parts: dict[int, list[QKV]] = {i: [] for i in layers}
    for part in tokens.split(chunk):
        x = model.embed(part)
        tables = Tables(torch.arange(cache.length, cache.length + len(part), device=x.device))
        for i, layer in enumerate(model.layers):
            made = layer.qkv(x)
            if i in parts:
                parts[i].append(made)
            q, k = (layer.rope.rotate(rows, tables[layer.rope]) for rows in (made.q, made.k))
            kv = cache.append(i, made.k, k, made.v)
            x = layer.finish(x, attend_chunk(q, kv.k, kv.v, layer.attention))
        cache.advance(len(part))
    return {
        i: QKV(*(torch.cat(x, 1) for x in zip(*found, strict=True))) for i, found in parts.items()
    }


def _trace(
    model: Model, number: int, seen: QKV, queries: int, past: int, distance: int, dtype: torch.dtype
) -> Trace:
    layer, total = model.layers[number], seen.v.shape[1]
    rope, prompt_tokens = layer.rope, total - queries
    here = rope.table(torch.arange(total, device=seen.v.device))
    rotated = rope.rotate(seen.q, here), rope.rotate(seen.k, here).to(dtype)
    windowed = _placed(seen.q, rope, distance), seen.k.to(dtype)
    return Trace(
        rotated=_space(*rotated, prompt_tokens, past),
        windowed=_space(*windowed, prompt_tokens, past),
        values=seen.v.to(dtype),
        asked=tuple(range(prompt_tokens + 1, total + 1)),
        prompt=prompt_tokens,
        scale=layer.attention.scale,
        rope=rope,
    )


def _placed(q: Float[Tensor, "Hq T D"], rope: Rope, distance: int) -> Float[Tensor, "Hq T D"]:
    """At one distance from keys that are not rotated; rotated keys would have the scaling, too."""
    table = rope.table(torch.full((q.shape[1],), distance, device=q.device))
    return rope.rotate(q, table) * rope.scaling


def _space(
    q: Float[Tensor, "Hq T D"], k: Float[Tensor, "Hk T D"], prompt_tokens: int, past: int
) -> Space:
    asks, before = q[:, prompt_tokens:], q[:, prompt_tokens - past : prompt_tokens]
    return Space(k, asks.transpose(0, 1).float().contiguous(), before.float().contiguous())
