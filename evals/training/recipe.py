"""What is trained on, when, and how fast: the recipe of the reference model."""

from dataclasses import dataclass, replace

from evals.training.network import Shape
from evals.training.windows import Mix

TASK_WEIGHTS = {
    "single": 2.0,
    "single_uuid": 0.6,
    "multi_value": 1.0,
    "multi_query": 1.2,
    "plain": 1.0,
    "two_hops": 3.0,
    "tracing": 1.2,
}


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the training.

    Args:
        until: share of the training at which it ends.
        lengths: weight of each window length, in tokens.
        mix: what the windows hold.
    """

    until: float
    lengths: dict[int, float]
    mix: Mix


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that the weights depend on, besides texts, seed and duration.

    Args:
        tokens: of one step.
        language: share of the tokens that are not answers on which the loss is taken.
        language_weight: of their loss, against 1 for the answers.
        muon_rate, adam_rate: of the matrices inside the layers, and of all else.
        warm_up: steps until the rates are reached.
        steady: share of the training after which they fall, as a square, to 3 %.
        sharpness: of the model that is written: attention's scores are multiplied by it. A softmax
            over more tokens than in training spreads; this takes its weight back together.
    """

    shape: Shape
    phases: tuple[Phase, ...]
    tokens: int = 8192
    language: float = 0.2
    language_weight: float = 0.3
    muon_rate: float = 0.01
    adam_rate: float = 0.003
    warm_up: int = 20
    steady: float = 0.25
    sharpness: float = 1.0

    def on(self, device: str) -> "Recipe":
        """The same with eight times the tokens a step where a GPU takes them at once."""
        return replace(self, tokens=8 * self.tokens) if device == "cuda" else self

    def phase(self, progress: float) -> Phase:
        """The one at `progress` (0..1)."""
        return next((each for each in self.phases if progress < each.until), self.phases[-1])

    def rate(self, progress: float, step: int) -> float:
        """By what the rates are multiplied."""
        fall = min(1.0, max(0.0, (1 - progress) / (1 - self.steady)))
        return min(1.0, (step + 1) / self.warm_up) * (0.03 + 0.97 * fall**2)


HOPS = TASK_WEIGHTS | {"two_hops": 5.0}  # the slowest to learn

MIDDLE = Mix(HOPS, copies=0.03, lines=0.3)
LAST = Mix(HOPS | {"multi_query": 2.0, "tracing": 2.0}, copies=0.02, lines=0.35)

REFERENCE = Recipe(
    shape=Shape(),
    phases=(
        Phase(0.25, {256: 0.7, 512: 0.3}, Mix(TASK_WEIGHTS)),
        Phase(0.5, {256: 0.3, 512: 0.3, 1024: 0.25, 2048: 0.15}, MIDDLE),
        Phase(1.0, {512: 0.3, 1024: 0.3, 2048: 0.25, 4096: 0.15}, LAST),
    ),
)

# What comes hardest, from the weights that REFERENCE gives: all values of a key, and one key among
# hundreds of its kind. Where values are few and near they are learned first.
HARD = {
    "single": 2.0, "single_uuid": 3.0, "multi_value": 5.0, "other_values": 3.0, "multi_query": 2.0,
    "plain": 1.0, "two_hops": 4.0, "tracing": 2.0,
}  # fmt: skip
FEW = Mix(HARD | {"multi_value": 7.0, "other_values": 4.0}, copies=0.02, lines=0.3, alone=0.2)
MANY = Mix(HARD, copies=0.02, lines=0.45, alone=0.4)

REFINED = Recipe(
    shape=REFERENCE.shape,
    phases=(
        Phase(0.25, {256: 0.6, 512: 0.4}, FEW),
        Phase(0.85, {512: 0.3, 1024: 0.2, 2048: 0.25, 4096: 0.25}, MANY),
        Phase(1.0, {1024: 0.2, 2048: 0.2, 4096: 0.3, 8192: 0.3}, MANY),
    ),
    muon_rate=0.006,
    adam_rate=0.0015,
    steady=0.4,
    sharpness=1.35,
)

# the same in seconds, to see that the parts fit together
TINY = Recipe(
    shape=Shape(layers=5, mlp=64),
    phases=(Phase(1.0, {128: 0.5, 160: 0.5}, Mix(TASK_WEIGHTS)),),
    tokens=640,
    warm_up=2,
)
