"""Every key, kept: the scores that all other indexes are an approximation of."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrieval.index import IndexSpec, State
from retrieval.pending import Rows, products


class Exact:
    """q · k of every token, from rotated keys in their own dtype. Saves nothing: the yardstick.

    `finalize` changes nothing, and need not be called.

    Args:
        dtype: of the keys.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._keys = Rows(num_kv_heads, (head_dim,), dtype, device)
        self.spec = IndexSpec(
            unit_tokens=1,
            key_space="rotated",
            score="exact",
            relocatable="rotate",
            bytes_per_token=float(head_dim * dtype.itemsize),
            shared_bytes=0,
        )

    @classmethod
    def from_state(cls, state: State) -> "Exact":
        """The index whose `state` this is; shares its tensors."""
        keys = state["keys"]
        index = cls(len(keys), keys.shape[2], keys.dtype, keys.device)
        index._keys = Rows.of(keys)
        return index

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return self._keys.length

    @property
    def nbytes(self) -> int:
        """Of its keys, room to grow included."""
        return self._keys.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None: a score is never wrong."""
        keys = self._keys.view
        return torch.empty((len(keys), 0), dtype=torch.int64, device=keys.device)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, rotated."""
        self._keys.append(keys)

    def finalize(self) -> None:
        """Nothing is chosen: scores are exact before and after."""

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """q · k of every token."""
        return products(query, self._keys.view)

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "Exact":
        """The same tokens `delta` positions later: every key is turned."""
        return Exact.from_state({"keys": turn(self._keys.view)})

    def state(self) -> State:
        """The keys: a view, not a copy."""
        return {"keys": self._keys.view}
