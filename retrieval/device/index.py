"""The seam of indexes on a device: all requests of a batch scored at once, in static shapes."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int32
from torch import Tensor

from retrieval.index import KeySpace, KVIndex
from retrieval.kernels.scores import Scores


@runtime_checkable
class DeviceIndex(Protocol):
    """The index of one layer for the B slots of a batch, some of which may be free.

    Everything is allocated when it is made, for a capacity in tokens, and stays where it is:
    `append` and `score` have static shapes and can be captured in a CUDA graph. Lengths live on
    the device, with the caller.

    adopt: the finalized index of one request, copied into a slot. Raises ValueError if it is of
        another kind or shape, not final, or longer than the capacity.
    clear: the slot is free; its tokens are no longer read once its length is 0.
    append: one key for each slot, in `key_space`, of the token number `positions[b]`; nothing
        where that is negative.
    score: estimates of q · k for every unit of tokens [0, lengths[b]), as the request's own index
        gives them.
    outliers: tokens that must be taken whatever the scores say, -1 where there are fewer; None
        if this kind has none.
    """

    unit_tokens: int
    key_space: KeySpace

    @property
    def nbytes(self) -> int: ...  # of all tensors it holds
    @property
    def outliers(self) -> Int32[Tensor, "B Hk S"] | None: ...
    def adopt(self, slot: int, index: KVIndex) -> None: ...
    def clear(self, slot: int) -> None: ...
    def append(self, keys: Float[Tensor, "B Hk D"], positions: Int32[Tensor, " B"]) -> None: ...
    def score(
        self, query: Float[Tensor, "B Hq D"], lengths: Int32[Tensor, " B"], scale: float
    ) -> Scores: ...
