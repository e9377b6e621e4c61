"""Bounds of the keys of a page: no key in it scores more (Quest, Tang et al. 2024)."""

from collections.abc import Callable
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrieval.index import IndexSpec, NotRelocatable, State
from retrieval.pending import Rows, products
from retrieval.units import Units


class Quest:
    """Pages of rotated keys, each known by the largest and smallest value of every channel.

    The score of a page is the largest q · k that a key within these bounds could have,

        Σ max(q·min, q·max) = relu(q) · max + min(q, 0) · min

    and so never less than that of any key in the page. Bounds are values of keys: in no dtype does
    rounding tighten them. Turned bounds would not bound turned keys, so that tokens at other
    positions need a new index. Before `finalize` a page scores its best key.

    Args:
        dtype: of the keys.
        page: tokens that share one score.
    Raises:
        ValueError: for a page without tokens.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        page: int = 16,
    ) -> None:
        if page < 1:
            raise ValueError(f"page must be at least 1 token, got {page}")
        self._units = Units(page, bounds, Rows(num_kv_heads, (head_dim,), dtype, device))
        self.spec = IndexSpec(
            unit_tokens=page,
            key_space="rotated",
            score="upper_bound",
            relocatable="rebuild",
            bytes_per_token=2 * head_dim * dtype.itemsize / page,
            shared_bytes=(page - 1) * head_dim * dtype.itemsize,  # at most: keys of an open page
        )

    @classmethod
    def from_state(cls, state: State) -> "Quest":
        """The index whose `state` this is; shares its tensors."""
        keys = state["keys"] if "keys" in state else state["open"]
        page = int(state["page"])
        index = cls(len(keys), keys.shape[2], keys.dtype, keys.device, page=page)
        index._units = Units.of(page, bounds, state)
        return index

    @property
    def length(self) -> int:
        """Tokens it stands for."""
        return self._units.length

    @property
    def nbytes(self) -> int:
        """Of bounds and of keys still held, room to grow included."""
        return self._units.nbytes

    @property
    def outliers(self) -> Int[Tensor, "Hk S"]:
        """None: bounds hold for every page."""
        heads = len(self._units.summaries)
        return torch.empty((heads, 0), dtype=torch.int64, device=self._units.summaries.device)

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys, rotated."""
        self._units.append(keys)

    def finalize(self) -> None:
        """Bounds take the place of keys."""
        self._units.finalize()

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """No less than q · k of any key in the page, for every page."""
        if self._units.waiting is not None:
            return self._units.exact(query)
        q = query.float()
        return products(torch.cat([q.clamp(min=0), q.clamp(max=0)], -1), self._units.summaries)

    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> NoReturn:
        """Not possible.

        Raises:
            NotRelocatable: always.
        """
        raise NotRelocatable(
            f"bounds of keys do not hold {delta} positions later: append the keys, rotated to "
            "their new positions, to a new Quest"
        )

    def state(self) -> State:
        """The page size, and keys or bounds; views, not copies."""
        return {"page": torch.tensor(self.spec.unit_tokens), **self._units.state()}


def bounds(keys: Float[Tensor, "Hk U N D"]) -> Float[Tensor, "Hk U twoD"]:
    """Of every channel over the N keys of a page: all maxima, then all minima."""
    return torch.cat([keys.amax(2), keys.amin(2)], -1)
