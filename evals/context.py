"""A text that is read once and asked about many times, by any method."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from engine.cache import SequenceCache
from engine.method import Method
from engine.model.pieces import Model
from engine.prefill import prefill
from engine.sparse.cache import SparseCache, latest, sparse_layers
from engine.sparse.indexes import INDEXES
from kvstore.pool.pool import Pool
from retrieval.index import State
from retrieval.select import Policy


class Context(SequenceCache):
    """A text that was read densely: its KV, its last queries, and the indexes made of them.

    `prefill_s` is what reading took, `build_s` by index what the first sparse cache with it took:
    its KV moved to the pool, and its indexes built.
    """

    def __init__(self, model: Model, tokens: Sequence[int]) -> None:
        super().__init__(model.shape, len(tokens))
        self.model = model
        self.queries: dict[int, Float[Tensor, "Hq N D"]] = {}
        self.build_s: dict[str, float] = {}
        self._states: dict[str, list[State]] = {}
        start = now(model.shape.device)
        self.read(tokens)
        self.prefill_s = now(model.shape.device) - start

    def read(self, tokens: Sequence[int]) -> None:
        """Tokens that follow; indexes are made of what was read before the first is asked for."""
        prefill(self.model, self, torch.tensor(tokens, device=self.model.shape.device))

    def observe(self, layer: int, queries: Float[Tensor, "Hq N D"]) -> None:
        """Keep the last ones, as `SparseCache` does."""
        self.queries[layer] = latest(self.queries.get(layer), queries)

    def dense(self, room: int) -> SequenceCache:
        """A copy that attends to everything, with room for so many more tokens."""
        copy = SequenceCache(self.model.shape, self.length + room)
        for i in range(self.model.shape.num_layers):
            copy.write(i, 0, *self.view(i, self.length))
        copy.advance(self.length)
        return copy

    @torch.inference_mode()
    def sparse(self, method: Method, pool: Pool, policy: Policy | None = None) -> SparseCache:
        """A cache in `pool` as if it had read the text.

        Its indexes start from the state of those that were built for the first such cache:
        building them for every question would take most of the time. Landmarks are built for
        each: their outliers are a matter of the budget, and are on the device from the start.

        Args:
            policy: takes the place of the method's.
        """
        states = self._index_states(method, pool) if method.index != "landmarks" else None
        bare = msgspec.structs.replace(method, index="exact", options={}) if states else method
        cache = self._filled(bare, pool, None if states else index_name(method))
        for number, i in enumerate(sparse_layers(self.model, method)):
            choice = cache.layer(i).choice
            assert choice is not None
            choice.policy = policy or choice.policy
            if states:
                choice.index = INDEXES[method.index].from_state(states[number])
        return cache

    @torch.inference_mode()
    def unrotated(self, layer: int, stop: int) -> Float[Tensor, "Hk T D"]:
        """Keys of tokens [0, stop) before their rotation."""
        return self.model.layers[layer].rope.unrotate(self.view(layer, stop).k, 0)

    def _index_states(self, method: Method, pool: Pool) -> list[State]:
        """Of the indexes of all layers; built once, whatever is asked with them."""
        name = index_name(method)
        if name not in self._states:
            with closing(self._filled(method, pool, name)) as cache:
                layers = map(cache.layer, sparse_layers(self.model, method))
                self._states[name] = [
                    x.choice.index.state() for x in layers if x.choice is not None
                ]
        return self._states[name]

    def _filled(self, method: Method, pool: Pool, name: str | None) -> SparseCache:
        """A cache of the text's KV; what it took is noted under the name, if there is one."""
        start = now(self.model.shape.device)
        cache = SparseCache(self.model, 1, method, pool)
        with ExitStack() as full:
            full.enter_context(closing(cache))
            for i in range(self.model.shape.num_layers):
                kv = self.view(i, self.length)
                cache.fill(i, kv.k, kv.v, self.queries.get(i))
            cache.adopt(self.length)
            full.pop_all()  # nothing failed: it stays open
        if name is not None:
            self.build_s.setdefault(name, now(self.model.shape.device) - start)
        return cache


def index_name(method: Method) -> str:
    """The same for methods whose indexes are the same."""
    return repr((method.index, method.options, method.distance, method.dense_layers))


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that the device was asked to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
