"""A few bits for every dimension of every key: the default index.

Keys less their mean, on axes of their own (`retrieval.axes`): more bits where keys vary more, each
number rounded to the best levels for a Gaussian, and one scale per token. Token-level codes
of 2 bits are what YAKV (2026) and Adamas (2025) arrive at; unlike means or bounds of chunks they
find a single token. Bits by variance find more with as many bytes where no token stands out
(`flat`, `scripts/bench_indexes.py`), and no less elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from retrieval.axes import Axes, groups
from retrieval.codes import Codes
from retrieval.index import IndexSpec, KeySpace, NotRelocatable, State
from retrieval.kernels.scan import scan, search
from retrieval.pending import Rows, products
from retrieval.select import Policy, top_tokens

Bits = Literal[1, 2, 4]
LEVELS: dict[int, tuple[float, ...]] = {  # positive ones, for variance 1 (Max 1960, Lloyd 1982)
    1: (0.7979,),
    2: (0.4528, 1.5104),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
RUN_KEYS = 1024  # encoded at once: what that takes stays in the cache
SAMPLED = 8192  # keys that directions are taken from at most, evenly spread


class ScalarIndex:
    """Codes of 1, 2 or 4 bits a dimension on average; a token's score is q · (mean + its code).

    `finalize` fixes the mean of the prompt's keys, of each KV head, and the axes they are coded in.
    The mean is no matter to a softmax, as q · mean is the same for all tokens, but codes of what is
    left of the keys are finer. They can be relocated freely unless their keys are rotated. A token
    whose key equals the mean, or is not finite, scores as the mean does.

    Args:
        dtype: of the keys.
        bits: of a dimension, on average: `head_dim` times them must fill codes of 4.
        seed: of the rotations.
    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        bits: Bits = 2,
        key_space: KeySpace = "rotated",
        seed: int = 0,
    ) -> None:
        if bits not in LEVELS or head_dim * bits % 4:
            raise ValueError(
                f"bits must be 1, 2 or 4, and head_dim a multiple of 4 / bits: got bits {bits} "
                f"and head_dim {head_dim}"
            )
        self._waiting: Rows | None = Rows(num_kv_heads, (head_dim,), dtype, device)
        self._codes = Codes(num_kv_heads, head_dim * bits // 4, scaled=True, device=device)
        self._mean = torch.zeros(num_kv_heads, 1, head_dim, dtype=torch.float32, device=device)
        self._axes: Axes | None = None  # until it is final
        self._bits, self._seed = bits, seed
        self.spec = IndexSpec(
            unit_tokens=1,
            key_space=key_space,
            score="estimate",
            relocatable="rebuild" if key_space == "rotated" else "free",
            bytes_per_token=head_dim * bits / 8 + 2,
            shared_bytes=4 * head_dim * (head_dim + 2),
        )

    @classmethod
    def from_state(cls, state: State) -> "ScalarIndex":
        """The index whose `state` this is; shares its tensors."""
        mean, keys = state["mean"], state.get("keys")
        bits, seed, space = state["settings"].tolist()
        index = cls(
            *(len(mean), mean.shape[2], mean.dtype if keys is None else keys.dtype, mean.device),
            bits=bits,
            key_space=get_args(KeySpace)[space],
            seed=seed,
        )
        index._mean, index._waiting = mean, None if keys is None else Rows.of(keys)
        if keys is None:
            index._codes, index._axes = Codes.from_state(state), Axes.from_state(state)
        return index

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self._codes.length if self._waiting is None else self._waiting.length

    @property
    def nbytes(self) -> int:
        """Of codes, scales, means, axes, and keys that wait, room to grow included."""
        waiting = 0 if self._waiting is None else self._waiting.nbytes
        axes = 0 if self._axes is None else self._axes.nbytes
        return waiting + self._codes.nbytes + self._mean.nbytes + axes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None: every token has its own code."""
        return torch.empty((len(self._mean), 0), dtype=torch.int64, device=self._mean.device)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, in the spec's key space."""
        if self._waiting is not None:
            self._waiting.append(keys)
            return
        assert self._axes is not None
        for run in keys.split(RUN_KEYS, 1):
            self._codes.append(*encoded(run.float() - self._mean, self._axes))

    def finalize(self) -> None:
        """Fix the mean and the axes; codes take the place of keys.

        Raises:
            RuntimeError: if it was called before.
        """
        if self._waiting is None:
            raise RuntimeError("the index is final: finalize comes once")
        keys, self._waiting = self._waiting.view, None
        sample = keys[:, :: -(-keys.shape[1] // SAMPLED) or 1]
        if keys.shape[1]:  # run by run: a copy of all keys in fp32 would be twice their size
            total = torch.zeros_like(self._mean)  # one: many small sums would cut up the heap
            for run in keys.split(RUN_KEYS, 1):
                total += run.float().nan_to_num(0, 0, 0).sum(1, True)
            self._mean = total / keys.shape[1]
        self._axes = Axes.fit(sample.float() - self._mean, self._codes.subspaces, self._seed)
        self._codes.reserve(keys.shape[1])
        self.append(keys)

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """q · k of every token: exact before `finalize`, then of its code."""
        if self._waiting is not None:
            return products(query, self._waiting.view)
        return scan(self._codes, self._table(query)).add_(products(query, self._mean))

    def search(
        self, query: Float[Tensor, "Hq D"], policy: Policy, scale: float
    ) -> Int[Tensor, "Hk K"]:
        """Ids of `top_tokens` of the scores; on a CPU without the scores ever being written."""
        if self._waiting is None:
            return search(self._codes, self._table(query), policy, scale)
        scores, heads = self.score(query), len(self._mean)
        return top_tokens(scores, policy, num_kv_heads=heads, length=self.length, scale=scale)

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "ScalarIndex":
        """The same tokens `delta` positions later: the same codes, if keys are not rotated.

        Raises:
            NotRelocatable: if they are: a rotation does not keep levels.
        """
        if self.spec.relocatable == "rebuild":
            raise NotRelocatable(
                f"codes of rotated keys do not hold {delta} positions later: build the index "
                "anew, or use key_space unrotated or windowed"
            )
        return ScalarIndex.from_state(self.state())

    def state(self) -> State:
        """Settings, and keys that wait or codes; views, not copies."""
        space = get_args(KeySpace).index(self.spec.key_space)
        settings = torch.tensor([self._bits, self._seed, space])
        state = {"settings": settings, "mean": self._mean}
        if self._waiting is not None:
            return {**state, "keys": self._waiting.view}
        assert self._axes is not None
        return {**state, **self._axes.state(), **self._codes.state()}

    def _table(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq M 16"]:
        """What each of the 16 codes of a sub-space adds to a score."""
        assert self._axes is not None
        axes, folded = self._axes, query.float().unflatten(0, (len(self._mean), -1))
        along = ((folded @ axes.basis) * axes.spread[:, None]).flatten(0, 1)
        tables = []
        for start, stop, bits in groups(axes.sizes):
            rows = patterns(bits, query.device)
            tables.append(along[:, start:stop].unflatten(1, (-1, rows.shape[1])) @ rows.mT)
        return torch.cat(tables, 1)


class Encoded(NamedTuple):
    codes: UInt8[Tensor, "Hk N M"]
    scales: Float16[Tensor, "Hk N"]


def encoded(keys: Float[Tensor, "Hk N D"], axes: Axes) -> Encoded:
    """Keys, less their mean, as the nearest levels on their axes, and each token's factor on them.

    The factor is that which makes <key, code> equal <key, key>, so that scores of queries along
    the key are not too small (RaBitQ, Gao and Long 2024), unlike that of least squares.
    """
    along = keys @ axes.basis / axes.spread[:, None]
    rms = along.square().mean(-1, keepdim=True).sqrt()
    unit = along / rms.clamp_min(torch.finfo(torch.float32).tiny)
    found = [
        _rounded(unit[..., group.start : group.stop], group.bits) for group in groups(axes.sizes)
    ]
    weights = axes.spread.square()[:, None]  # of a product of two coordinates
    product = (unit * torch.cat([values for _, values in found], -1) * weights).sum(-1)
    factor = (unit.square() * weights).sum(-1) / product
    scales = (rms[..., 0] * factor).nan_to_num(0).clamp(max=torch.finfo(torch.float16).max)
    return Encoded(torch.cat([codes for codes, _ in found], -1), scales.half())


def _rounded(
    unit: Float[Tensor, "Hk N E"], bits: int
) -> tuple[UInt8[Tensor, "Hk N M"], Float[Tensor, "Hk N E"]]:
    """Codes of numbers of variance 1, and the levels that they stand for."""
    table, edges, shifts = _grid(bits, unit.device)
    digits = torch.bucketize(unit.contiguous(), edges, out_int32=True)
    codes = (digits.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1)
    return codes.to(torch.uint8), table[digits]


class _Grid(NamedTuple):
    """What numbers are rounded by: levels, the middles between them, where bits stand in a code."""

    levels: Float[Tensor, " levels"]
    edges: Float[Tensor, " edges"]
    shifts: Int[Tensor, " dims"]


@functools.cache
def _grid(bits: int, device: torch.device) -> _Grid:
    """Made once: a token that is added while decoding has no time to. Do not write into it."""
    table = levels(bits).to(device)
    shifts = torch.arange(0, 4, bits, dtype=torch.int32, device=device)
    return _Grid(table, (table[1:] + table[:-1]) / 2, shifts)


def levels(bits: int) -> Float[Tensor, " levels"]:
    """The 2^bits values that a number with the normal distribution is rounded to, ascending."""
    positive = torch.tensor(LEVELS[bits], dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


@functools.cache
def patterns(bits: int, device: torch.device | str = "cpu") -> Float[Tensor, "16 dims"]:
    """The levels that each of the 16 codes stands for; the first dimension has the lowest bits.

    Shared: do not write into it.
    """
    digits = torch.arange(16)[:, None] >> torch.arange(0, 4, bits)
    return levels(bits)[digits % (1 << bits)].to(device)
