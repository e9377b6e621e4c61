"""A few bits for every dimension of every key: the default index.

Keys less their mean, rotated so that all dimensions hold alike much, each dimension rounded to
the best levels for a Gaussian, and one scale per token. Token-level codes of 2 bits are what YAKV
(2026) and Adamas (2025) arrive at; unlike means or bounds of chunks they find a single token.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from retrieval.codes import Codes
from retrieval.hadamard import rotation
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


class ScalarIndex:
    """Codes of 1, 2 or 4 bits for every dimension; the score of a token is q · (mean + its code).

    `finalize` fixes the mean of the prompt's keys, of each KV head. It is no matter to a softmax,
    as q · mean is the same for all tokens, but codes of what is left of the keys are finer. They
    can be relocated freely unless their keys are rotated. A token whose key equals the mean, or
    is not finite, scores as the mean does.

    Args:
        dtype: of the keys.
        bits: of a dimension; 4 / bits of them, neighbours, share a code, so that their number
            must divide `head_dim`.
        seed: of the rotation.
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
        self._bits, self._seed = bits, seed
        self.spec = IndexSpec(
            unit_tokens=1,
            key_space=key_space,
            score="estimate",
            relocatable="rebuild" if key_space == "rotated" else "free",
            bytes_per_token=head_dim * bits / 8 + 2,
            shared_bytes=4 * head_dim,
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
            index._codes = Codes.from_state(state)
        return index

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self._codes.length if self._waiting is None else self._waiting.length

    @property
    def nbytes(self) -> int:
        """Of codes, scales, means, and keys that wait, room to grow included.

        Without the rotation, which all indexes share.
        """
        waiting = 0 if self._waiting is None else self._waiting.nbytes
        return waiting + self._codes.nbytes + self._mean.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None: every token has its own code."""
        return torch.empty((len(self._mean), 0), dtype=torch.int64, device=self._mean.device)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, in the spec's key space."""
        if self._waiting is not None:
            self._waiting.append(keys)
            return
        for run in keys.split(RUN_KEYS, 1):
            centred = (run.float() - self._mean) @ self._rotation
            self._codes.append(*encoded(centred, self._bits))

    def finalize(self) -> None:
        """Fix the mean; codes take the place of keys.

        Raises:
            RuntimeError: if it was called before.
        """
        if self._waiting is None:
            raise RuntimeError("the index is final: finalize comes once")
        keys, self._waiting = self._waiting.view, None
        if keys.shape[1]:  # run by run: a copy of all keys in fp32 would be twice their size
            sums = [
                run.sum(1, keepdim=True, dtype=torch.float32) for run in keys.split(RUN_KEYS, 1)
            ]
            self._mean = torch.stack(sums).sum(0) / keys.shape[1]
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
        held = self._codes.state() if self._waiting is None else {"keys": self._waiting.view}
        return {"settings": settings, "mean": self._mean, **held}

    @property
    def _rotation(self) -> Float[Tensor, "D D"]:
        return rotation(self._mean.shape[2], self._seed, self._mean.device)

    def _table(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq M 16"]:
        """What each of the 16 codes of a sub-space adds to a score."""
        rows = patterns(self._bits).to(query.device)
        return (query.float() @ self._rotation).unflatten(1, (-1, rows.shape[1])) @ rows.mT


class Encoded(NamedTuple):
    codes: UInt8[Tensor, "Hk N M"]
    scales: Float16[Tensor, "Hk N"]


def encoded(keys: Float[Tensor, "Hk N D"], bits: Bits) -> Encoded:
    """Every dimension as the nearest level, and the factor on levels of each token.

    The factor is that which makes <key, code> equal <key, key>, so that scores of queries along
    the key are not too small (RaBitQ, Gao and Long 2024). Least squares, <key, code> / <code,
    code>, finds less: 0.916 instead of 0.936 of the oracle's attention with 2 bits (Gaussian keys
    of 128 dimensions, one length, 2% budget), 0.9748 and 0.9751 with scattered evidence.
    """
    rms = keys.square().mean(-1, keepdim=True).sqrt()
    unit = keys / rms.clamp_min(torch.finfo(torch.float32).tiny)
    table = levels(bits).to(keys.device)
    digits = torch.bucketize(unit, (table[1:] + table[:-1]) / 2, out_int32=True)
    factor = keys.shape[-1] / (unit * table[digits]).sum(-1)
    scales = (rms[..., 0] * factor).nan_to_num(0).clamp(max=torch.finfo(torch.float16).max)
    shifts = torch.arange(0, 4, bits, dtype=torch.int32, device=keys.device)
    codes = (digits.unflatten(-1, (-1, len(shifts))) << shifts).sum(-1)
    return Encoded(codes.to(torch.uint8), scales.half())


def levels(bits: Bits) -> Float[Tensor, " levels"]:
    """The 2^bits values that a number with the normal distribution is rounded to, ascending."""
    positive = torch.tensor(LEVELS[bits], dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


def patterns(bits: Bits) -> Float[Tensor, "16 dims"]:
    """The levels that each of the 16 codes stands for; the first dimension has the lowest bits."""
    digits = torch.arange(16)[:, None] >> torch.arange(0, 4, bits)
    return levels(bits)[digits % (1 << bits)]
