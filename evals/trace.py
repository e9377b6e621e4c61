"""What one layer's attention saw: keys, values, and the queries that came for them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from engine.model.rope import Rope, Tables
from retrieval.index import KeySpace


class Space(NamedTuple):
    """Keys and queries of one key space, see `retrieval.index.IndexSpec`.

    past: queries that came before those of interest, for indexes that learn from queries.
    """

    keys: Float[Tensor, "Hk T D"]
    queries: Float[Tensor, "N Hq D"]
    past: Float[Tensor, "Hq P D"]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """N queries of one layer and what there was to attend to.

    Args:
        rotated: what attention takes. With `rope`, row t of its keys was turned by t positions.
        windowed: keys unrotated, queries at one distance from all of them; with the model's
            attention scaling in them, so that `scale` serves both spaces.
        asked: for each query how many tokens there were, itself included; ascending.
        prompt: tokens after which an index is finalized; at most the first of `asked`.
        rope: None where keys have no positions.
    Raises:
        ValueError: if the lengths contradict each other.
    """

    rotated: Space
    windowed: Space
    values: Float[Tensor, "Hk T D"]
    asked: tuple[int, ...]
    prompt: int
    scale: float
    rope: Rope | None = None

    def __post_init__(self) -> None:
        ends = (self.prompt, *self.asked, self.values.shape[1])
        if list(ends) != sorted(ends) or len(self.asked) != len(self.rotated.queries):
            raise ValueError(
                f"need one length a query, ascending, from the prompt's {self.prompt} to "
                f"{self.values.shape[1]}: got {self.asked} for {len(self.rotated.queries)} queries"
            )

    def space(self, name: KeySpace) -> Space:
        """The one an index lives in. ValueError for unrotated, which no index asks for here."""
        if name == "unrotated":
            raise ValueError("a trace has rotated and windowed keys: choose one for the index")
        return self.rotated if name == "rotated" else self.windowed

    def turned(self, keys: Float[Tensor, "Hk T D"]) -> Float[Tensor, "Hk T D"]:
        """Unrotated keys of all tokens, rotated to where they stand."""
        if self.rope is None:
            return keys
        positions = torch.arange(keys.shape[1], device=keys.device)
        return self.rope.rotate(keys, Tables(positions)[self.rope])
