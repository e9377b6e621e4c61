"""The seam between an index and the engine: keys go in, scores of their tokens come out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from retrieval.select import Policy

State = Mapping[str, Tensor]  # what an index needs to be there again: plain tensors, no objects
KeySpace = Literal["rotated", "unrotated", "windowed"]


@dataclass(frozen=True, slots=True)
class IndexSpec:
    """What an index promises, so that accounts and tests can be made without knowing it.

    Args:
        unit_tokens: tokens that share one score: 1, or the size of a chunk or page.
        key_space: the keys that `append` takes, and with them the query of `score`.
            rotated: both at their true positions. unrotated: neither rotated. windowed: keys
            unrotated, the query at one constant distance (A2ATS, 2025).
        score: how a score relates to q · k, for a unit of several tokens to the largest of them.
        relocatable: what moving all tokens by some distance costs: nothing, a rotation of what
            is stored, or building the index anew.
        bytes_per_token: of one KV head, without `shared_bytes`.
        shared_bytes: of one KV head, whatever the length (codebooks, means).
    """

    unit_tokens: int
    key_space: KeySpace
    score: Literal["exact", "estimate", "upper_bound"]
    relocatable: Literal["free", "rotate", "rebuild"]
    bytes_per_token: float
    shared_bytes: int


@runtime_checkable
class KVIndex(Protocol):
    """A small stand-in for the keys of one layer of one request.

    append: the next N keys, in the spec's key space; a prompt in any cut, then generated tokens.
    finalize: the prompt is complete: means, codebooks and outliers are chosen now and stay. Until
        then scores are exact. Once only; later keys are encoded with what was chosen.
    score: an estimate of q · k, unscaled, for every unit. A last, partial unit counts.
    outliers: tokens that must be taken whatever the scores say, ascending; may be empty.
    relocate: the same tokens `delta` positions later. `turn` rotates rows by `delta`. Raises
        NotRelocatable where the spec says rebuild; leaves this index as it is.
    state, from_state: as tensors and back; ids selected are the same afterwards.
    """

    spec: IndexSpec

    @property
    def length(self) -> int: ...  # tokens
    @property
    def nbytes(self) -> int: ...  # of all tensors it holds
    @property
    def outliers(self) -> Int[Tensor, "Hk S"]: ...
    def append(self, keys: Float[Tensor, "Hk N D"]) -> None: ...
    def finalize(self) -> None: ...
    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]: ...
    def relocate(self, delta: int, turn: Callable[[Tensor], Tensor]) -> "KVIndex": ...
    def state(self) -> State: ...


@runtime_checkable
class Searching(Protocol):
    """An index that finds tokens without writing scores: the ids of `top_tokens` of its scores."""

    def search(
        self, query: Float[Tensor, "Hq D"], policy: Policy, scale: float
    ) -> Int[Tensor, "Hk K"]: ...


class NotRelocatable(ValueError):
    """The index must be built anew from keys at their new positions."""
