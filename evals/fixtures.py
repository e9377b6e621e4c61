"""Attention with planted evidence, whose answer is known: what an index has to cope with.

    clustered   each query's evidence lies in a few contiguous spans of 32 tokens
    scattered   as many tokens of as much weight, but one in every chunk of 8, in stretches of 128
    flat        no token matters: all weigh alike, up to a factor
    sink        the first 4 tokens take most of the attention, whatever is asked
    drift       clustered; half of the tokens come after the prompt, and the means of keys and of
                queries turn away from those of the prompt, down to a cosine of 0.3

Keys are a common mean of `MEAN` times the length of what varies, and noise whose variance falls as
1 / rank in random directions: 90% of it takes 74 of 128 directions (rotated keys of the reference
models take 58 to 84). Queries have a mean and a spectrum of their own, in other directions, and
each a topic; evidence is keys that are shifted along a topic until they hold `HELD` of the
attention. Query heads of a group share topics and nothing else. There are no positions.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from evals.trace import Space, Trace

Kind = Literal["clustered", "scattered", "flat", "sink", "drift"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEAN = 2.0  # length of the keys' mean, in lengths of a key's noise
SPREAD = 1.0  # standard deviation of the scores of a query with keys that are no evidence
FLAT_SPREAD = 0.5  # the same where no token matters: attention is as wide as 0.88 of the tokens
HELD = 0.9  # attention that evidence holds, sinks of the sink fixture too
SPAN = 32  # clustered: tokens of evidence in a row, wherever chunks may begin
CHUNK = 8  # scattered: tokens of which one is evidence
STRETCH = 128  # tokens that hold one span, or one piece of evidence in every chunk
EVIDENCE = 128 / 16384  # share of the tokens that are evidence for a query
SINKS = 4
LAST_COSINE = 0.3
PAST = 128  # earlier queries of each query head
TOPIC = 2.0  # length of the values of evidence, in those of their noise


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fixture is.

    Args:
        group: query heads of a KV head.
        queries: of each query head.
    Raises:
        ValueError: below 1,000 tokens there is no room for evidence.
    """

    tokens: int = 16384
    head_dim: int = 128
    kv_heads: int = 1
    group: int = 4
    queries: int = 16

    def __post_init__(self) -> None:
        if self.tokens < 1000 or min(self.kv_heads, self.group, self.queries) < 1:
            raise ValueError(f"need 1,000 tokens at least, and heads and queries: {self}")
        if self.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2, got {self.head_dim}")


class _Head(NamedTuple):
    """One KV head and its group."""

    keys: Float[Tensor, "T D"]
    values: Float[Tensor, "T D"]
    queries: Float[Tensor, "N G D"]
    past: Float[Tensor, "G P D"]


class _Asked(NamedTuple):
    queries: Float[Tensor, "N G D"]
    topics: Float[Tensor, "N D"]
    past: Float[Tensor, "G P D"]
    common: Float[Tensor, " D"]  # the direction that all queries of the prompt share


def make_fixture(kind: Kind, seed: int, size: Size | None = None) -> Trace:
    """A fixture; the same for the same arguments. Keys and values are bf16, queries fp32."""
    size = size or Size()
    if kind not in KINDS:
        raise ValueError(f"no fixture {kind!r}; there are {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(len(KINDS) * seed + KINDS.index(kind))
    prompt, asked = _lengths(kind, size)
    heads = [_head(kind, size, prompt, asked, generator) for _ in range(size.kv_heads)]
    space = Space(
        keys=torch.stack([head.keys for head in heads]).bfloat16(),
        queries=torch.cat([head.queries for head in heads], 1),
        past=torch.cat([head.past for head in heads]),
    )
    values = torch.stack([head.values for head in heads]).bfloat16()
    return Trace(space, space, values, asked, prompt, size.head_dim**-0.5)


def _lengths(kind: Kind, size: Size) -> tuple[int, tuple[int, ...]]:
    """Tokens of the prompt, and those there are when each query comes."""
    if kind != "drift":
        return size.tokens, (size.tokens,) * size.queries
    prompt = size.tokens // 2
    later = (size.tokens - prompt) / size.queries
    return prompt, tuple(prompt + round((n + 1) * later) for n in range(size.queries))


def _head(
    kind: Kind, size: Size, prompt: int, asked: tuple[int, ...], generator: torch.Generator
) -> _Head:
    dim = size.head_dim
    shape = _spectrum(dim, generator)
    lengths = torch.tensor(asked)
    turn = _cosines(prompt, size.tokens) if kind == "drift" else torch.ones(size.tokens)
    noise = torch.randn(size.tokens, dim, generator=generator) @ shape
    keys = noise + MEAN * math.sqrt(dim) * _turning(torch.randn(2, dim, generator=generator), turn)
    found = _ask(kind, size, shape, turn[lengths - 1], generator)
    values = torch.randn(size.tokens, dim, generator=generator)
    values += torch.randn(dim, generator=generator)
    if kind == "sink":
        _plant(keys, found.queries.flatten(0, 1), found.common, torch.arange(SINKS), size.tokens)
    if kind not in ("sink", "flat"):
        for n, length in enumerate(asked):
            spots = _spots(length, kind == "scattered", generator)
            _plant(keys, found.queries[n], found.topics[n], spots, length)
            values[spots] += TOPIC * torch.randn(dim, generator=generator)
    return _Head(keys, values, found.queries, found.past)


def _spectrum(dim: int, generator: torch.Generator) -> Float[Tensor, "D D"]:
    """What turns white noise into noise of squared length D whose variances fall as 1 / rank."""
    variances = 1 / torch.arange(1, dim + 1)
    variances *= dim / variances.sum()
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    return variances.sqrt()[:, None] * directions


def _cosines(prompt: int, tokens: int) -> Float[Tensor, " T"]:
    """1 within the prompt, then falling to `LAST_COSINE` at the last token."""
    after = 1 - (1 - LAST_COSINE) * torch.arange(1, tokens - prompt + 1) / (tokens - prompt)
    return torch.cat([torch.ones(prompt), after])


def _turning(pair: Float[Tensor, "2 D"], cosines: Float[Tensor, " n"]) -> Float[Tensor, "n D"]:
    """Unit vectors at these cosines to the first of the pair, towards the second."""
    first = F.normalize(pair[0], dim=0)
    second = F.normalize(pair[1] - (pair[1] @ first) * first, dim=0)
    return cosines[:, None] * first + (1 - cosines.square()).sqrt()[:, None] * second


def _ask(
    kind: Kind,
    size: Size,
    shape: Float[Tensor, "D D"],
    cosines: Float[Tensor, " N"],
    generator: torch.Generator,
) -> _Asked:
    """Queries of a mean, a topic for each and something of their own, all from one spectrum."""
    spectrum = _spectrum(size.head_dim, generator)

    def drawn(*count: int) -> Tensor:
        rows = torch.randn(*count, size.head_dim, generator=generator) @ spectrum
        return F.normalize(rows, dim=-1)

    pair, topics = drawn(2), drawn(size.queries)
    own, past = drawn(size.queries, size.group), drawn(size.group, PAST)
    weight = 2.0 if kind == "sink" else 0.6
    common = weight * _turning(pair, cosines)
    queries = common[:, None] + topics[:, None] + 0.6 * own
    earlier = weight * F.normalize(pair[0], dim=0) + drawn(PAST) + 0.6 * past
    spread = FLAT_SPREAD if kind == "flat" else SPREAD
    queries, earlier = (_spread(x, shape, spread) for x in (queries, earlier))
    return _Asked(queries, topics, earlier, pair[0])


def _spread(
    queries: Float[Tensor, "*n D"], shape: Float[Tensor, "D D"], spread: float
) -> Float[Tensor, "*n D"]:
    """Queries of such a length that their scores with keys of this shape vary by `spread`."""
    deviation = (queries @ shape.mT).norm(dim=-1, keepdim=True) * queries.shape[-1] ** -0.5
    return queries * spread / deviation


def _spots(length: int, scattered: bool, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Where a query's evidence lies among the first `length` tokens, not at their ends."""
    cells, each = length // STRETCH - 2, STRETCH // CHUNK if scattered else SPAN
    count = min(cells, max(1, round(length * EVIDENCE / each)))
    starts = STRETCH * (1 + torch.randperm(cells, generator=generator)[:count])[:, None]
    if scattered:
        within = torch.randint(CHUNK, (count, each), generator=generator)
        return (starts + CHUNK * torch.arange(each) + within).flatten()
    first = torch.randint(STRETCH - SPAN + 1, (count, 1), generator=generator)
    return (starts + first + torch.arange(SPAN)).flatten()


def _plant(
    keys: Float[Tensor, "T D"],
    queries: Float[Tensor, "n D"],
    direction: Float[Tensor, " D"],
    spots: Int[Tensor, " spots"],
    length: int,
) -> None:
    """Shift keys at `spots` until they hold `HELD` of these queries' attention, on average."""
    scale = keys.shape[1] ** -0.5
    scores = scale * queries @ keys[:length].mT
    inside = scores[:, spots].logsumexp(-1)
    scores[:, spots] = -torch.inf
    missing = math.log(HELD / (1 - HELD)) + scores.logsumexp(-1) - inside
    keys[spots] += missing.mean() / (scale * (queries @ direction).mean()) * direction
