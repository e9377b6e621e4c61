"""Means of chunks of keys, and the chunks whose mean misleads (ShadowKV, Sun et al. 2024)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrieval.index import IndexSpec, State
from retrieval.pending import Rows, products
from retrieval.units import Units

RUN_ELEMENTS = 1 << 20  # of keys compared with their means at once: 4 MiB in fp32


class Landmarks:
    """Chunks of rotated keys, each known by its mean; a chunk scores q · mean.

    A mean says little of keys that point elsewhere. When the prompt is complete, each KV head's
    chunks with the smallest cosine between the mean and one of its keys become outliers: their
    tokens are always taken, and their scores are -inf, so that they have no share in the softmax
    of the others. Only full chunks of the prompt are candidates. Rotation is linear, so that
    turned means are the means of turned keys, and keeps angles, so that outliers stay. Before
    `finalize` a chunk scores its best key.

    Args:
        dtype: of the keys, and of their means.
        chunk: tokens that share one score.
        outlier_chunks: of each KV head, all if there are fewer; each takes `chunk` tokens of the
            budget.
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
        chunk: int = 8,
        outlier_chunks: int = 48,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        if outlier_chunks < 0:
            raise ValueError(f"outlier_chunks must not be negative, got {outlier_chunks}")
        self._units = Units(chunk, means, Rows(num_kv_heads, (head_dim,), dtype, device))
        self._outlier_chunks = outlier_chunks
        self._chosen = torch.empty((num_kv_heads, 0), dtype=torch.int64, device=device)
        key_bytes = head_dim * dtype.itemsize
        self.spec = IndexSpec(
            unit_tokens=chunk,
            key_space="rotated",
            score="estimate",
            relocatable="rotate",
            bytes_per_token=key_bytes / chunk,
            shared_bytes=8 * outlier_chunks + (chunk - 1) * key_bytes,  # at most: an open chunk
        )

    @classmethod
    def from_state(cls, state: State) -> "Landmarks":
        """The index whose `state` this is; shares its tensors."""
        keys = state["keys"] if "keys" in state else state["open"]
        chunk, outlier_chunks = int(state["chunk"]), int(state["outlier_chunks"])
        index = cls(
            *(len(keys), keys.shape[2], keys.dtype, keys.device),
            chunk=chunk,
            outlier_chunks=outlier_chunks,
        )
        index._units = Units.of(chunk, means, state)
        index._chosen = state["chosen"]
        return index

    @property
    def length(self) -> int:
        """Tokens it stands for."""
        return self._units.length

    @property
    def nbytes(self) -> int:
        """Of means, of keys still held and of the choice of outliers, room to grow included."""
        return self._units.nbytes + self._chosen.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """Tokens of the chunks whose mean misleads, ascending; none before `finalize`."""
        chunk = self.spec.unit_tokens
        within = torch.arange(chunk, device=self._chosen.device)
        return (self._chosen[..., None] * chunk + within).flatten(1)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, rotated."""
        self._units.append(keys)

    def finalize(self) -> None:
        """Choose outliers; means take the place of keys."""
        keys = self._units.waiting
        self._units.finalize()
        assert keys is not None
        found = least_cosines(keys, self.spec.unit_tokens).sort(dim=-1, stable=True).indices
        self._chosen = found[:, : self._outlier_chunks].sort(-1).values

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """q · mean of every chunk; -inf for outliers."""
        if self._units.waiting is not None:
            return self._units.exact(query)
        scores = products(query, self._units.summaries)
        group = len(scores) // len(self._chosen)
        return scores.scatter_(1, self._chosen.repeat_interleave(group, 0), -torch.inf)

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "Landmarks":
        """The same tokens `delta` positions later: means (or the keys that wait) are turned."""
        turned = {name: turn(rows) for name, rows in self._units.state().items()}
        return Landmarks.from_state({**self.state(), **turned})

    def state(self) -> State:
        """Settings, the chosen chunks, and keys or means; views, not copies."""
        return {
            "chunk": torch.tensor(self.spec.unit_tokens),
            "outlier_chunks": torch.tensor(self._outlier_chunks),
            "chosen": self._chosen,
            **self._units.state(),
        }


def means(keys: Float[Tensor, "Hk U N D"]) -> Float[Tensor, "Hk U D"]:
    """Of the N keys of a chunk, summed in fp32 and rounded once."""
    return keys.mean(2, dtype=torch.float32).to(keys.dtype)


def least_cosines(keys: Float[Tensor, "Hk N D"], chunk: int) -> Float[Tensor, "Hk U"]:
    """The smallest cosine between the mean of a full chunk and one of its keys."""
    units = keys.shape[1] // chunk
    chunks = keys[:, : units * chunk].unflatten(1, (units, chunk))
    run = max(1, RUN_ELEMENTS // chunks[:, :1].numel()) if units else 1
    least = torch.empty(chunks.shape[:2], device=keys.device)
    for out, part in zip(least.split(run, 1), chunks.split(run, 1), strict=True):
        out[:] = _least_cosines(part.float())
    return least


def _least_cosines(chunks: Float[Tensor, "Hk U N D"]) -> Float[Tensor, "Hk U"]:
    return F.cosine_similarity(chunks, chunks.mean(2, keepdim=True), dim=-1).amin(2)
