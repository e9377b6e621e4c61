"""What one request attends to: rotated keys and values, layer by layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from engine.attention import attend_token
from engine.model.pieces import AttentionSpec, Shape
from engine.recorder import Recorder
from kvstore.block import LayerKV
from native.pages import large_pages


class Query(NamedTuple):
    """The query of one token in one layer, in the spaces that a choice may be made in."""

    rotated: Float[Tensor, "Hq D"]
    unrotated: Float[Tensor, "Hq D"]


@dataclass(slots=True)
class SparseStats:
    """What sparse decode did, summed over steps, layers and KV heads."""

    steps: int = 0  # tokens decoded
    selected: int = 0  # rows attended to
    escalated: int = 0  # times that a layer's budget was doubled for a step
    hits: int = 0  # of these, those that were on the device already
    guessed: int = 0  # hits that a prefetch had fetched since the step before
    fetched_bytes: int = 0  # rows of misses and of guesses
    host_key_rows: int = 0  # keys read in host memory
    waited_s: float = 0.0  # for prefetches to end

    def __iadd__(self, other: "SparseStats") -> "SparseStats":
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        return self

    @property
    def hit_share(self) -> float:
        return self.hits / self.selected if self.selected else 0.0


@runtime_checkable
class Cache(Protocol):
    """What the loops need of a request's cache.

    append, write: as in `SequenceCache`; view, too, until a layer's prompt is complete.
    advance: so many more tokens are complete.
    exact: leading tokens whose KV is that of attention to all tokens before them: others may have
        it, under the names of these tokens.
    observe: unrotated queries of the prompt, chunk by chunk, for indexes that learn from them.
    finalize: the prompt is complete; called once, before the first `attend`.
    attend: attention of the token appended last, not yet advanced over.
    wants_guess, look_ahead: whether guessed queries are of use, and one for a layer to come; None
        where the loop has none. Changes when KV moves, and of exact rows nothing else.
    close: free what it holds; idempotent.
    """

    @property
    def length(self) -> int: ...
    @property
    def exact(self) -> int: ...
    @property
    def recorder(self) -> Recorder | None: ...
    @property
    def stats(self) -> SparseStats | None: ...
    @property
    def wants_guess(self) -> bool: ...
    def append(
        self,
        layer: int,
        k: Float[Tensor, "Hk N D"],
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV: ...
    def write(
        self,
        layer: int,
        start: int,
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV: ...
    def view(self, layer: int, stop: int) -> LayerKV: ...
    def advance(self, count: int) -> None: ...
    def observe(self, layer: int, queries: Float[Tensor, "Hq N D"]) -> None: ...
    def finalize(self) -> None: ...
    def attend(self, layer: int, query: Query, spec: AttentionSpec) -> Float[Tensor, "Hq D"]: ...
    def look_ahead(self, layer: int, guess: Query | None) -> None: ...
    def close(self) -> None: ...


class Everything:
    """What caches do that choose what to attend to, for those that attend to everything."""

    wants_guess = False
    stats = None

    def observe(self, layer: int, queries: Float[Tensor, "Hq N D"]) -> None:
        """Nothing: all tokens are attended to."""

    def finalize(self) -> None:
        """Nothing, as above."""

    def look_ahead(self, layer: int, guess: Query | None) -> None:
        """Nothing, as above."""

    def close(self) -> None:
        """Nothing: memory goes with the object."""


class DenseCache(Everything, ABC):
    """Rotated keys and values of all tokens, in buffers that are written in place.

    Keys here are rotated (a dense step must not rotate its whole context); what the store gets
    are the unrotated ones, through `recorder`.

        [0, length) complete in every layer   [length, length + N) being written by a loop

    Args:
        recorder: takes the unrotated KV of new tokens; None where nothing is stored.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.length = 0
        self.recorder = recorder

    @property
    def exact(self) -> int:
        """All: every token attended to all before it."""
        return self.length

    @abstractmethod
    def buffers(self, layer: int, tokens: int) -> LayerKV:
        """All memory of a layer, which has room for so many tokens, or for more."""

    def append(
        self,
        layer: int,
        k: Float[Tensor, "Hk N D"],
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """Write N tokens after `length` in one layer; returns all tokens of that layer, a view."""
        if self.recorder is not None:
            self.recorder.write(layer, self.length, k, v)
        return self.write(layer, self.length, rotated, v)

    def write(
        self,
        layer: int,
        start: int,
        rotated: Float[Tensor, "Hk N D"],
        v: Float[Tensor, "Hk N D"],
    ) -> LayerKV:
        """Write N rotated keys and values at `start`; returns tokens [0, start + N), a view."""
        stop = start + v.shape[1]
        kv = self.buffers(layer, stop)
        kv.k[:, start:stop] = rotated
        kv.v[:, start:stop] = v
        return LayerKV(kv.k[:, :stop], kv.v[:, :stop])

    def advance(self, count: int) -> None:
        """Declare `count` more tokens complete in every layer."""
        self.length += count

    def attend(self, layer: int, query: Query, spec: AttentionSpec) -> Float[Tensor, "Hq D"]:
        """Attention of the token appended last, over all of them."""
        kv = self.view(layer, self.length + 1)
        return attend_token(query.rotated, kv.k, kv.v, spec)

    def view(self, layer: int, stop: int) -> LayerKV:
        """Tokens [0, stop) of a layer, with room made for them. KeyError if it was released."""
        kv = self.buffers(layer, stop)
        return LayerKV(kv.k[:, :stop], kv.v[:, :stop])


class SequenceCache(DenseCache):
    """The working set of one request, in buffers of each layer's own.

    A layer takes memory from its first write on, so that a loop which reads layer after layer,
    and releases each, has one at a time.

    Args:
        capacity: tokens a layer has room for at first; its buffers grow beyond it by half.
    """

    def __init__(self, shape: Shape, capacity: int, recorder: Recorder | None = None) -> None:
        super().__init__(recorder)
        self._shape, self._capacity = shape, max(1, capacity)
        nothing = LayerKV(self._buffer(0), self._buffer(0))
        self._layers = dict.fromkeys(range(shape.num_layers), nothing)  # less those released

    def buffers(self, layer: int, tokens: int) -> LayerKV:
        """The buffers of a layer, moved to larger ones where they are too small."""
        old = self._layers[layer]
        have = old.v.shape[1]
        if tokens > have:
            size = max(tokens, self._capacity, have + have // 2)
            self._layers[layer] = LayerKV(*(self._moved(x, size) for x in old))
        return self._layers[layer]

    def release(self, layer: int) -> None:
        """Free the memory of a layer, which is used no more."""
        del self._layers[layer]

    def _buffer(self, tokens: int) -> Float[Tensor, "Hk tokens D"]:
        s = self._shape
        size = (s.num_kv_heads, tokens, s.head_dim)
        with torch.inference_mode(False):  # whoever writes later need not be in that mode
            return large_pages(torch.empty(size, dtype=s.dtype, device=s.device))

    def _moved(self, old: Float[Tensor, "Hk T D"], tokens: int) -> Float[Tensor, "Hk tokens D"]:
        new = self._buffer(tokens)
        new[:, : old.shape[1]] = old
        return new
