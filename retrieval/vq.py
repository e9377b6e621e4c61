"""One code per key, of a codebook that knows the queries (A2ATS, He et al. 2025)."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrieval.codebook import Codebook, looked_up
from retrieval.index import IndexSpec, KeySpace, NotRelocatable, State
from retrieval.learner import Learner, Recipe
from retrieval.metric import Moment
from retrieval.pending import Rows, products


@dataclass(frozen=True, slots=True)
class Guard:
    """What happens to keys that a codebook does not know.

    The error of a key is its squared distance to its centroid, in the codebook's metric, over the
    mean squared distance of the prompt's keys to their mean: 1 is as bad as no codebook at all.
    On the small reference models a codebook of other text leaves at most 0.25 of the keys above
    0.75 (0.01 in the metric of queries), and on random tokens 0.2 to 1 of them.

    Args:
        error: above this a key is badly coded.
        share: of badly coded keys in any head, above which a given codebook is not used: the
            sequence trains its own.
        tokens: of each KV head at most whose exact keys are kept, the worst first, so that their
            scores are exact.
    """

    error: float = 0.75
    share: float = 0.15
    tokens: int = 64

    def __post_init__(self) -> None:
        if self.error < 0 or self.share < 0 or self.tokens < 0:
            raise ValueError(f"a guard's settings must not be negative, got {self}")

    @classmethod
    def of(cls, values: Float[Tensor, "3"]) -> "Guard":
        error, share, tokens = values.tolist()
        return cls(error, share, int(tokens))


@dataclass(frozen=True, slots=True)
class VQStats:
    """How well the prompt is coded.

    Args:
        own_codebook: the codebook was trained on this sequence.
        refused: a codebook was given and did not fit.
        bad_share: of badly coded keys in the worst head, under the codebook that is used.
        error: mean over all keys and heads, see `Guard`.
        exact_tokens: of each KV head whose keys are kept.
    """

    own_codebook: bool
    refused: bool
    bad_share: float
    error: float
    exact_tokens: int


class VQIndex:
    """Keys as the nearest of C centroids; the score of a token is that of its centroid.

    With unrotated keys a code has no position, and moving tokens costs nothing; the query comes
    rotated to one constant distance then (windowed RoPE). All tokens of a code score alike.
    Keys are coded in the metric of the queries that `calibrate` was given, or plainly. A prompt
    with no more distinct keys than centroids is scored exactly.

    Args:
        dtype: of the keys.
        centroids: C of each KV head, when the sequence trains its own codebook.
        codebook: made before from other keys, in the same key space; used if it fits the prompt,
            see `Guard`, and needs no FAISS then. `None` trains one at `finalize`.
        points, iterations, seed, ridge: see `Recipe`.
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
        key_space: KeySpace = "windowed",
        centroids: int = 1024,
        codebook: Codebook | None = None,
        guard: Guard | None = None,
        points: int = 32,
        iterations: int = 10,
        seed: int = 0,
        ridge: float = 1e-3,
    ) -> None:
        if not 1 <= centroids <= 1 << 15:
            raise ValueError(f"centroids must be in 1 .. 32768, got {centroids}")
        if codebook is not None and codebook.metric.mean.shape != (num_kv_heads, head_dim):
            raise ValueError(
                f"the codebook is for {list(codebook.metric.mean.shape)} KV heads and dimensions, "
                f"the keys have {[num_kv_heads, head_dim]}"
            )
        recipe = Recipe(1, centroids, points, iterations, seed, ridge)
        keys = Rows(num_kv_heads, (head_dim,), dtype, device)
        self._learner: Learner | None = Learner(
            recipe, keys, Moment(num_kv_heads, head_dim, device)
        )
        self._book = codebook
        most = centroids if codebook is None else max(centroids, codebook.centroids.shape[2])
        self._codes = Rows(num_kv_heads, (), torch.uint8 if most <= 256 else torch.int16, device)
        self._exact = torch.empty((num_kv_heads, 0), dtype=torch.int64, device=device)
        self._exact_keys = torch.empty((num_kv_heads, 0, head_dim), dtype=dtype, device=device)
        self._guard, self._key_space = guard or Guard(), key_space
        self.stats: VQStats | None = None  # after `finalize`
        self.spec = self._spec()

    @classmethod
    def from_state(cls, state: State) -> "VQIndex":
        """The index whose `state` this is; shares its tensors."""
        kept = state["exact_keys"]
        book = Codebook.from_state(state) if "codebook" in state else None
        learner = Learner.from_state(state) if "keys" in state else None
        index = cls(
            *(len(kept), kept.shape[2], kept.dtype, kept.device),
            key_space=get_args(KeySpace)[int(state["key_space"])],
            centroids=learner.recipe.centroids if learner else 1,
            codebook=book,
            guard=Guard.of(state["guard"]),
        )
        index._learner = learner
        if learner is None:
            index._codes = Rows.of(state["codes"])
            index._exact, index._exact_keys = state["exact"], kept
            own, refused, bad_share, error, tokens = state["stats"].tolist()
            index.stats = VQStats(bool(own), bool(refused), bad_share, error, int(tokens))
        index.spec = index._spec()
        return index

    @property
    def length(self) -> int:
        """Tokens it stands for."""
        return self._learner.length if self._learner else self._codes.length

    @property
    def nbytes(self) -> int:
        """Of codes, codebook, and keys still held, room to grow included."""
        waiting = self._learner.nbytes if self._learner else 0
        book = self._book.nbytes if self._book else 0
        kept = self._exact.nbytes + self._exact_keys.nbytes
        return waiting + book + kept + self._codes.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None: badly coded keys are scored exactly instead."""
        return self._exact[:, :0]

    @property
    def codebook(self) -> Codebook | None:
        """The one in use, to be given to other sequences; before `finalize` the one given."""
        return self._book

    def calibrate(self, queries: Float[Tensor, "Hq N D"]) -> None:
        """Queries like those to come, in the key space; any number of calls before `finalize`.

        A codebook that was given keeps its own metric; one of the sequence's own takes this one.

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
            assert self._book is not None
            self._codes.append(self._book.encode(keys).codes[..., 0].to(self._codes.view.dtype))

    def finalize(self) -> None:
        """Choose the codebook, code every key, keep those that are badly coded.

        Raises:
            RuntimeError: if it was called before.
            ValueError: if there is no key and no codebook was given.
            ImportError: if a codebook is to be trained and FAISS is missing.
        """
        learner = self._open()
        book = self._book or learner.train()
        codes, errors = _coded(book, learner.keys)
        refused = self._book is not None and self._bad_share(errors) > self._guard.share
        if refused:
            book = learner.train(like=book.metric)
            codes, errors = _coded(book, learner.keys)
        own = refused or self._book is None
        self._book = book
        self._keep_worst(errors, learner.keys)
        self._codes.append(codes.to(self._codes.view.dtype))
        self.stats = VQStats(
            *(own, refused, self._bad_share(errors)),
            error=float(errors.mean()) if learner.length else 0.0,
            exact_tokens=self._exact.shape[1],
        )
        self._learner = None
        self.spec = self._spec()

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """q · centroid of every token, q · k where the key is kept."""
        if self._learner is not None:
            return self._learner.score(query)
        assert self._book is not None
        table = self._book.table(query)[:, :, 0]  # [Hk, G, C]
        scores = looked_up(table, self._codes.view)
        if not self._exact.shape[1]:
            return scores
        tokens = self._exact.repeat_interleave(table.shape[1], 0)
        return scores.scatter_(1, tokens, products(query, self._exact_keys))

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "VQIndex":
        """The same tokens `delta` positions later, where keys have no position.

        Raises:
            NotRelocatable: if keys are rotated.
        """
        if self._key_space == "rotated":
            raise NotRelocatable(
                f"codes of rotated keys do not hold {delta} positions later: use key_space "
                "'windowed', or append the keys at their new positions to a new VQIndex"
            )
        return VQIndex.from_state(self.state())

    def state(self) -> State:
        """Settings, and keys that wait or codes and codebook; views, not copies."""
        book = self._book.state() if self._book else {}
        guard = (self._guard.error, self._guard.share, self._guard.tokens)
        state = {
            "key_space": torch.tensor(get_args(KeySpace).index(self._key_space)),
            "guard": torch.tensor(guard, dtype=torch.float64),
            "exact": self._exact,
            "exact_keys": self._exact_keys,
            **book,
        }
        if self._learner is not None:
            return {**state, **self._learner.state()}
        assert self.stats is not None
        stats = torch.tensor(astuple(self.stats), dtype=torch.float64)
        return {**state, "codes": self._codes.view, "stats": stats}

    def _open(self) -> Learner:
        if self._learner is None:
            raise RuntimeError("the index is final: calibrate and finalize come before, once")
        return self._learner

    def _bad_share(self, errors: Float[Tensor, "Hk N"]) -> float:
        if not errors.shape[1]:
            return 0.0
        return float((errors > self._guard.error).float().mean(1).max())

    def _keep_worst(self, errors: Float[Tensor, "Hk N"], keys: Float[Tensor, "Hk N D"]) -> None:
        """As many of every head as the head with the most badly coded keys has, up to the cap."""
        bad = int((errors > self._guard.error).sum(1).max()) if errors.shape[1] else 0
        worst = errors.sort(dim=1, descending=True, stable=True).indices
        self._exact = worst[:, : min(bad, self._guard.tokens)].sort(-1).values
        taken = [own.index_select(0, ids) for own, ids in zip(keys, self._exact, strict=True)]
        self._exact_keys = torch.stack(taken)

    def _spec(self) -> IndexSpec:
        """Before the codebook is there, with what it will take at most."""
        heads, _, dim = self._exact_keys.shape
        row = dim * self._exact_keys.element_size() + self._exact.element_size()
        if self._learner is not None:
            metric = dim + (2 * dim * dim if self._learner.calibrated else 0)
            shared = 4 * (self._learner.recipe.centroids * dim + metric) + self._guard.tokens * row
        else:
            assert self._book is not None
            shared = self._book.nbytes // heads + self._exact.shape[1] * row
        return IndexSpec(
            unit_tokens=1,
            key_space=self._key_space,
            score="estimate",
            relocatable="rebuild" if self._key_space == "rotated" else "free",
            bytes_per_token=float(self._codes.view.element_size()),
            shared_bytes=shared,
        )


def _coded(
    book: Codebook, keys: Float[Tensor, "Hk N D"]
) -> tuple[Int[Tensor, "Hk N"], Float[Tensor, "Hk N"]]:
    """Codes, and errors relative to what the keys vary in the codebook's metric."""
    codes, errors = book.encode(keys)
    return codes[..., 0], errors / book.metric.spread(keys)[:, None].clamp_min(1e-30)
