"""What a choice of tokens keeps of attention, beside the best choice of as many tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from evals.trace import Trace
from retrieval.index import KVIndex
from retrieval.pending import products
from retrieval.pq import PQIndex
from retrieval.scalar import ScalarIndex
from retrieval.select import Policy, top_tokens
from retrieval.vq import VQIndex

APPENDED = 1000  # tokens given to an index at once: prompts come in chunks


class Truth(NamedTuple):
    """Of one query: attention over everything, and the oracle's choice under a policy."""

    probs: Float[Tensor, "Hq T"]
    out: Float[Tensor, "Hq D"]
    tokens: Int[Tensor, "Hk K"]
    policy: Policy


class Rows(NamedTuple):
    """Keys and values that are attended to, where they are not the trace's own."""

    keys: Float[Tensor, "Hk T D"]
    values: Float[Tensor, "Hk T D"]


class Recall(NamedTuple):
    """What an index found, for every query and KV head; means over the query heads of a group.

    mass: attention on the tokens taken, in shares of the oracle's.
    error: |o - ô| / |o| of attention's output.
    fetched: tokens taken, sinks, window and outliers included.
    union: different tokens if each query head of a group chose as many by itself.
    nbytes: of the index per token and KV head at the end, shared ones and room to grow included.
    """

    mass: Float[Tensor, "N Hk"]
    error: Float[Tensor, "N Hk"]
    fetched: Int[Tensor, "N Hk"]
    union: Int[Tensor, "N Hk"]
    nbytes: float


def truths(trace: Trace, share: float, *, sinks: int = 4, window: int = 16) -> list[Truth]:
    """For every query, with a budget of this share of the tokens there are when it comes."""
    found = []
    heads = len(trace.values)
    for query, length in zip(trace.rotated.queries, trace.asked, strict=True):
        keys, values = trace.rotated.keys[:, :length], trace.values[:, :length]
        scores = products(query, keys)
        policy = Policy(max(round(share * length), sinks + window + 1), sinks, window)
        tokens = top_tokens(scores, policy, num_kv_heads=heads, length=length, scale=trace.scale)
        probs = (scores * trace.scale).softmax(-1)
        out = probs.unflatten(0, (heads, -1)) @ values.float()
        found.append(Truth(probs, out.flatten(0, 1), tokens, policy))
    return found


def mass(probs: Float[Tensor, "Hq T"], tokens: Int[Tensor, "Hk K"]) -> Float[Tensor, " Hq"]:
    """Attention of each query head on the tokens of its KV head."""
    return probs.gather(1, tokens.repeat_interleave(len(probs) // len(tokens), 0)).sum(-1)


def attended(
    query: Float[Tensor, "Hq D"], rows: Rows, tokens: Int[Tensor, "Hk K"], scale: float
) -> Float[Tensor, "Hq D"]:
    """Attention over these tokens only."""
    at = tokens[..., None].expand(-1, -1, rows.keys.shape[2])
    weights = (products(query, rows.keys.gather(1, at)) * scale).softmax(-1)
    chosen = rows.values.gather(1, at).float()
    return (weights.unflatten(0, (len(tokens), -1)) @ chosen).flatten(0, 1)


def union(tokens: Int[Tensor, "Hq K"], num_kv_heads: int) -> Int[Tensor, " Hk"]:
    """How many different tokens the query heads of each group have."""
    groups = tokens.unflatten(0, (num_kv_heads, -1)).flatten(1).tolist()
    return torch.tensor([len(set(group)) for group in groups])


def fill(index: KVIndex, trace: Trace, *, calibrated: bool) -> None:
    """Give an empty index the prompt of a trace, and earlier queries if it learns from them."""
    space = trace.space(index.spec.key_space)
    if calibrated:
        if not isinstance(index, PQIndex | VQIndex):
            raise ValueError(f"{type(index).__name__} does not learn from queries")
        index.calibrate(space.past)
    _append(index, trace, trace.prompt)
    index.finalize()


def recall(
    index: KVIndex, trace: Trace, truth: list[Truth], attended_rows: Rows | None = None
) -> Recall:
    """Ask a filled index every query of its trace, at the length at which it came.

    Args:
        attended_rows: keys and values of all tokens as they are kept; None takes the exact ones.
    Raises:
        ValueError: if the index has more tokens than there were when the first query came.
    """
    if index.length > trace.asked[0]:
        raise ValueError(
            f"the first query came after {trace.asked[0]} tokens, the index has {index.length}: "
            "fill a new one"
        )
    rows = attended_rows or Rows(trace.rotated.keys, trace.values)
    heads, found = len(trace.values), []
    for n, (length, want) in enumerate(zip(trace.asked, truth, strict=True)):
        _append(index, trace, length)
        tokens, together = _choice(index, trace, n, want.policy)
        off = attended(trace.rotated.queries[n], rows, tokens, trace.scale) - want.out
        error = off.norm(dim=-1) / want.out.norm(dim=-1).clamp_min(1e-30)
        got, best = mass(want.probs, tokens), mass(want.probs, want.tokens)
        share = _grouped(got, heads) / _grouped(best, heads)
        count = torch.full((heads,), tokens.shape[1])
        found.append((share, _grouped(error, heads), count, together))
    shares, errors, fetched, unions = (torch.stack(x) for x in zip(*found, strict=True))
    return Recall(shares, errors, fetched, unions, index.nbytes / (index.length * heads))


def _grouped(values: Float[Tensor, " Hq"], num_kv_heads: int) -> Float[Tensor, " Hk"]:
    return values.unflatten(0, (num_kv_heads, -1)).mean(1)


def _append(index: KVIndex, trace: Trace, length: int) -> None:
    keys = trace.space(index.spec.key_space).keys
    for start in range(index.length, length, APPENDED):
        index.append(keys[:, start : min(length, start + APPENDED)])


def _choice(
    index: KVIndex, trace: Trace, number: int, policy: Policy
) -> tuple[Int[Tensor, "Hk K"], Int[Tensor, " Hk"]]:
    """Tokens as the engine selects them, and how many the query heads would take apart."""
    query, heads = trace.space(index.spec.key_space).queries[number], len(trace.values)
    scores, group = index.score(query), len(query) // heads

    def best(num_kv_heads: int, outliers: Tensor) -> Tensor:
        return top_tokens(
            scores,
            policy,
            num_kv_heads=num_kv_heads,
            length=index.length,
            scale=trace.scale,
            unit=index.spec.unit_tokens,
            outliers=outliers,
        )

    apart = best(len(query), index.outliers.repeat_interleave(group, 0))
    if isinstance(index, ScalarIndex):
        tokens = index.search(query, policy, trace.scale)
    else:
        tokens = best(heads, index.outliers)
    return tokens, union(apart, heads)
