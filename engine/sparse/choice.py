"""Which tokens of a layer a query attends to: an index, in the key space that it asks for."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from engine.cache import Query
from engine.method import Method
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import Rope
from engine.sampling import refuse_infinite
from engine.sparse.indexes import make_index
from retrieval.index import KeySpace, Searching
from retrieval.pq import PQIndex
from retrieval.select import top_tokens
from retrieval.vq import VQIndex


class Choice:
    """The index over a prompt's keys and those that follow, and the policy that takes the best.

    Args:
        rotated: the prompt's keys, rotated; read while this is made.
        queries: unrotated queries of the prompt's last tokens, for indexes that learn from them.
    Raises:
        ModelError: codebooks are to be made of numbers that are not finite.
    """

    def __init__(
        self,
        method: Method,
        shape: Shape,
        spec: AttentionSpec,
        rope: Rope,
        rotated: Float[Tensor, "Hk T D"],
        queries: Float[Tensor, "Hq N D"] | None,
    ) -> None:
        self._method, self._spec, self._rope = method, spec, rope
        self.length = 0
        self.policy = method.policy(method.tokens(rotated.shape[1]))
        self.index = make_index(method, shape, self.policy.budget)
        if isinstance(self.index, VQIndex | PQIndex):  # k-means takes no other numbers
            refuse_infinite("keys", rotated)
            refuse_infinite("queries", queries)
        if queries is not None and isinstance(self.index, VQIndex):
            start = rotated.shape[1] - queries.shape[1]
            self.index.calibrate(self._placed(queries, start))
        self.append(rotated)  # at once: keys are held until the index is final
        self.index.finalize()

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def append(self, rotated: Float[Tensor, "Hk N D"]) -> None:
        """The keys of the next N tokens."""
        if self.index.spec.key_space == "rotated":
            self.index.append(rotated)
        else:
            self.index.append(self._rope.unrotate(rotated, self.length))
        self.length += rotated.shape[1]

    def select(self, query: Query, budget: int | None = None) -> Int[Tensor, "Hk K"]:
        """Tokens that matter to a query, ascending.

        Args:
            budget: takes the place of the policy's, and there is no top-p.
        """
        asked, scale = self._asked(query)
        policy = self.policy if budget is None else replace(self.policy, budget=budget, top_p=None)
        if isinstance(self.index, Searching):
            return self.index.search(asked, policy, scale)
        outliers = self.index.outliers
        return top_tokens(
            self.index.score(asked),
            policy,
            num_kv_heads=len(outliers),
            length=self.length,
            scale=scale,
            unit=self.index.spec.unit_tokens,
            outliers=outliers,
        )

    def _asked(self, query: Query) -> tuple[Float[Tensor, "Hq D"], float]:
        """The query in the index's key space, and the factor on its scores."""
        space, scale = self.index.spec.key_space, self._spec.scale
        if space == "rotated":
            return query.rotated, scale
        asked = self._placed(query.unrotated[:, None], self.length)[:, 0]
        return asked, scale * unturned(space, self._rope)

    def _placed(self, queries: Float[Tensor, "Hq N D"], start: int) -> Float[Tensor, "Hq N D"]:
        """Queries of the tokens from `start` on, in the index's key space."""
        if self.index.spec.key_space == "unrotated":
            return queries
        at = torch.arange(start, start + queries.shape[1], device=queries.device)
        if self.index.spec.key_space == "windowed":
            at = torch.full_like(at, self._method.distance)
        return self._rope.rotate(queries, self._rope.table(at))


def unturned(space: KeySpace, rope: Rope) -> float:
    """What rotation, which scales with YaRN, would have multiplied scores of this space by."""
    return rope.scaling ** {"rotated": 0, "windowed": 1, "unrotated": 2}[space]
