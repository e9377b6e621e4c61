"""Keys cut into sub-spaces, each coded by itself: product quantization (Jégou et al. 2011).

Trained by FAISS (Douze et al. 2024) on the sequence's own keys, as PQCache (Zhang et al. 2025)
does; in the metric of queries, where there are any (A2ATS, He et al. 2025).
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from retrieval.codebook import Codebook
from retrieval.codes import Codes
from retrieval.index import IndexSpec, KeySpace, NotRelocatable, State
from retrieval.kernels.scan import scan, search
from retrieval.learner import Learner, Recipe
from retrieval.metric import Moment
from retrieval.pending import Rows
from retrieval.select import Policy, top_tokens

RUN_KEYS = 1 << 14  # coded at once
RUN_TOKENS = 4096  # codes looked up at once: their places stay in the cache


class PQIndex:
    """M codes of 8 or 4 bits per key; the score of a token is the sum of M table entries.

    Keys are coded less their mean, and in the metric of the queries that `calibrate` was given,
    or plainly. A prompt with no more distinct keys than centroids (256 or 16) is scored exactly,
    with 4 bits up to the rounding of tables to bytes, see `retrieval.kernels.scan`.

    Args:
        dtype: of the keys.
        subspaces: M; divides `head_dim`.
        bits: of a code.
        codebook: made before from other keys, in the same key space: needs no FAISS then. `None`
            trains one at `finalize`.
        points, iterations, seed, ridge: see `Recipe`.
    Raises:
        ValueError: for a setting out of range, or a codebook of another shape.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        key_space: KeySpace = "rotated",
        subspaces: int = 16,
        bits: Literal[4, 8] = 8,
        codebook: Codebook | None = None,
        points: int = 64,
        iterations: int = 10,
        seed: int = 0,
        ridge: float = 1e-3,
    ) -> None:
        _check((num_kv_heads, head_dim), subspaces, bits, codebook)
        recipe = Recipe(subspaces, 1 << bits, points, iterations, seed, ridge)
        keys = Rows(num_kv_heads, (head_dim,), dtype, device)
        moment = Moment(num_kv_heads, head_dim, device)
        self._learner: Learner | None = Learner(recipe, keys, moment)
        self._book, self._key_space, self._bits = codebook, key_space, bits
        self._subspaces = subspaces
        self._like = keys.view  # no key: their shape, dtype and device
        self._codes: Rows | Codes = (
            Rows(num_kv_heads, (subspaces,), torch.uint8, device)
            if bits == 8
            else Codes(num_kv_heads, subspaces, scaled=False, device=device)
        )
        self.spec = self._spec()

    @classmethod
    def from_state(cls, state: State) -> "PQIndex":
        """The index whose `state` this is; shares its tensors."""
        book = Codebook.from_state(state) if "codebook" in state else None
        learner = Learner.from_state(state) if "keys" in state else None
        like, (subspaces, bits, space) = state["like"], state["settings"].tolist()
        index = cls(
            *(len(like), like.shape[2], like.dtype, like.device),
            key_space=get_args(KeySpace)[space],
            subspaces=subspaces,
            bits=bits,
            codebook=book,
        )
        index._learner = learner
        if learner is None:
            index._codes = Codes.from_state(state) if bits == 4 else Rows.of(state["codes"])
        index.spec = index._spec()
        return index

    @property
    def length(self) -> int:
        """Tokens it stands for."""
        return self._learner.length if self._learner else self._codes.length

    @property
    def nbytes(self) -> int:
        """Of codes, codebook, and keys that wait, room to grow included."""
        waiting = self._learner.nbytes if self._learner else 0
        return waiting + (self._book.nbytes if self._book else 0) + self._codes.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None."""
        heads = len(self._like)
        return torch.empty((heads, 0), dtype=torch.int64, device=self._like.device)

    @property
    def codebook(self) -> Codebook | None:
        """The one in use, to be given to other sequences; before `finalize` the one given."""
        return self._book

    def calibrate(self, queries: Float[Tensor, "Hq N D"]) -> None:
        """Queries like those to come, in the key space; any number of calls before `finalize`.

        A codebook that was given keeps its own metric.

        Raises:
            RuntimeError: after `finalize`.
        """
        self._open().calibrate(queries)
        self.spec = self._spec()

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys."""
        if self._learner is not None:
            self._learner.append(keys)
        else:
            self._encode(keys)

    def finalize(self) -> None:
        """Choose the codebook and code every key.

        Raises:
            RuntimeError: if it was called before.
            ValueError: if there is no key and no codebook was given.
            ImportError: if a codebook is to be trained and FAISS is missing.
        """
        learner = self._open()
        self._book = self._book or learner.train()
        self._encode(learner.keys)
        self._learner = None
        self.spec = self._spec()

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """q · coded key of every token."""
        if self._learner is not None:
            return self._learner.score(query)
        table = self._table(query)
        if isinstance(self._codes, Codes):
            return scan(self._codes, table.flatten(0, 1))
        found = [summed(own, codes) for own, codes in zip(table, self._codes.view, strict=True)]
        return torch.cat(found)

    def search(
        self, query: Float[Tensor, "Hq D"], policy: Policy, scale: float
    ) -> Int[Tensor, "Hk K"]:
        """`top_tokens` of the scores; with 4 bits no scores are written where that is faster."""
        if self._learner is None and isinstance(self._codes, Codes):
            return search(self._codes, self._table(query).flatten(0, 1), policy, scale)
        scores, heads = self.score(query), len(self._like)
        return top_tokens(scores, policy, num_kv_heads=heads, length=self.length, scale=scale)

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "PQIndex":
        """The same tokens `delta` positions later, where keys have no position.

        Raises:
            NotRelocatable: if keys are rotated.
        """
        if self._key_space == "rotated":
            raise NotRelocatable(
                f"codes of rotated keys do not hold {delta} positions later: use key_space "
                "'unrotated', or append the keys at their new positions to a new PQIndex"
            )
        return PQIndex.from_state(self.state())

    def state(self) -> State:
        """Settings, and keys that wait or codes and codebook; views, not copies."""
        space = get_args(KeySpace).index(self._key_space)
        state = {
            "like": self._like,
            "settings": torch.tensor([self._subspaces, self._bits, space]),
            **(self._book.state() if self._book else {}),
        }
        if self._learner is not None:
            return {**state, **self._learner.state()}
        if isinstance(self._codes, Codes):
            return {**state, **self._codes.state()}
        return {**state, "codes": self._codes.view}

    def _open(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("the index is final: calibrate and finalize come before, once")
        return self._learner

    def _encode(self, keys: Float[Tensor, "Hk N D"]) -> None:
        assert self._book is not None
        for run in keys.split(RUN_KEYS, 1):
            self._codes.append(self._book.encode(run).codes.to(torch.uint8))

    def _table(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hk G M C"]:
        """With as many columns as codes there could be: the last one is repeated."""
        assert self._book is not None
        table = self._book.table(query)
        missing = (1 << self._bits) - table.shape[-1]
        return torch.cat([table, table[..., -1:].expand(*table.shape[:-1], missing)], -1)

    def _spec(self) -> IndexSpec:
        """Before the codebook is there, with what it will take at most."""
        heads, _, dim = self._like.shape
        if self._learner is not None:
            metric = dim + (2 * dim * dim if self._learner.calibrated else 0)
            shared = 4 * ((1 << self._bits) * dim + metric)
        else:
            assert self._book is not None
            shared = self._book.nbytes // heads
        return IndexSpec(
            unit_tokens=1,
            key_space=self._key_space,
            score="estimate",
            relocatable="rebuild" if self._key_space == "rotated" else "free",
            bytes_per_token=self._subspaces * self._bits / 8,
            shared_bytes=shared,
        )


def summed(table: Float[Tensor, "G M C"], codes: UInt8[Tensor, "T M"]) -> Float[Tensor, "G T"]:
    """The M entries of every token's codes, added up, for each query head.

    131,072 tokens of one KV head with 4 query heads, M = 16: 3 ms on one AVX-512 core, where
    one lookup per sub-space takes 9.
    """
    weights = table.flatten(1).mT.contiguous()  # [M * C, G]
    offsets = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    offsets *= table.shape[2]
    found = [F.embedding_bag(x + offsets, weights, mode="sum") for x in codes.split(RUN_TOKENS)]
    return torch.cat(found).mT.contiguous()


def _check(shape: tuple[int, int], subspaces: int, bits: int, codebook: Codebook | None) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if subspaces < 1 or shape[1] % subspaces:
        raise ValueError(f"subspaces must divide the {shape[1]} dimensions, got {subspaces}")
    if codebook is None:
        return
    heads, parts, centroids, size = codebook.centroids.shape
    if (heads, parts, parts * size) != (shape[0], subspaces, shape[1]) or centroids > 1 << bits:
        raise ValueError(
            f"need a codebook of {shape[0]} KV heads, {subspaces} sub-spaces of "
            f"{shape[1] // subspaces} and at most {1 << bits} centroids, got "
            f"{list(codebook.centroids.shape)}"
        )
