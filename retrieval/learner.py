"""What waits for `finalize` to become a codebook: keys, queries, and how to train."""

from dataclasses import astuple, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrieval.codebook import Codebook, Training, train_codebook
from retrieval.index import State
from retrieval.metric import Metric, Moment, make_metric
from retrieval.pending import Rows, products


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a sequence's own codebook is made.

    Args:
        subspaces: a key is cut into this many parts, each coded by itself.
        centroids: of each sub-space; fewer where a sequence has fewer distinct keys.
        points, iterations, seed: see `Training`.
        ridge: see `make_metric`.
    """

    subspaces: int
    centroids: int
    points: int = 64
    iterations: int = 10
    seed: int = 0
    ridge: float = 1e-3

    @property
    def training(self) -> Training:
        return Training(self.points, self.iterations, self.seed)

    def state(self) -> State:
        whole, ridge = astuple(self)[:-1], self.ridge
        return {
            "recipe": torch.tensor(whole),
            "ridge": torch.tensor(ridge, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: State) -> "Recipe":
        subspaces, centroids, points, iterations, seed = state["recipe"].tolist()
        ridge = float(state["ridge"])
        return cls(subspaces, centroids, points, iterations, seed, ridge)


class Learner:
    """The keys of a prompt until it is complete, scored exactly, and the queries of H."""

    def __init__(self, recipe: Recipe, keys: Rows, moment: Moment) -> None:
        self.recipe, self._keys, self._moment = recipe, keys, moment

    @classmethod
    def from_state(cls, state: State) -> "Learner":
        """The learner whose `state` this is; shares its keys."""
        moment = Moment.of(state["moment"], int(state["queries"]))
        return cls(Recipe.from_state(state), Rows.of(state["keys"]), moment)

    @property
    def keys(self) -> Float[Tensor, "Hk T D"]:
        return self._keys.view

    @property
    def length(self) -> int:
        return self._keys.length

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._moment.value.nbytes

    @property
    def calibrated(self) -> bool:
        """Whether any query has come."""
        return self._moment.count > 0

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys."""
        self._keys.append(keys)

    def calibrate(self, queries: Float[Tensor, "Hq N D"]) -> None:
        """Queries like those to come, in the key space of the index; any number of calls."""
        self._moment.add(queries)

    def score(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq N"]:
        """q · k, exact."""
        return products(query, self.keys)

    def train(self, like: Metric | None = None) -> Codebook:
        """A codebook of the keys: in the metric of the queries, else that of `like`, else plain."""
        recipe = self.recipe
        mean = self.keys.mean(1, dtype=torch.float32)
        if self.calibrated or like is None:
            moment = self._moment.value if self.calibrated else None
            metric = make_metric(mean, moment, ridge=recipe.ridge)
        else:
            metric = like._replace(mean=mean)
        return train_codebook(
            self.keys,
            metric,
            subspaces=recipe.subspaces,
            centroids=recipe.centroids,
            training=recipe.training,
        )

    def state(self) -> State:
        return {
            "keys": self.keys,
            "moment": self._moment.value,
            "queries": torch.tensor(self._moment.count),
            **self.recipe.state(),
        }
