"""How a long context is attended to in decode: settings, and the presets that name systems."""

from math import inf
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError
from kvstore.names import wrong_name
from retrieval.select import Policy

IndexName = Literal["dense", "exact", "landmarks", "quest", "vq", "pq", "scalar"]
Numbers = Literal["exact", "int8", "int4"]
MOST = 1 << 31  # of whole numbers: less than that


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of sparse decode. The default attends to everything.

    Args:
        index: what finds the tokens that matter; "dense" attends to all of them. "vq" learns from
            queries of the prompt's last tokens, those that are computed: what of a prompt is
            loaded from the store changes what it selects.
        options: settings of the index, e.g. {"bits": 2}; see the classes in `retrieval`.
        keys: what attended keys are: as they were computed, rebuilt from low-rank factors of the
            whole layer (ShadowKV), or quantized in host memory.
        rank: of low-rank keys, at most KV heads x head_dim.
        values: as `keys`.
        budget: tokens each KV head attends to, sinks and window included; below 1, the share of
            the prompt's tokens.
        sinks, window: leading and trailing tokens always attended to.
        reduce: how the query heads of a KV head agree: "max" or "sum" of their probabilities.
        top_p: see `retrieval.select.Policy`; None takes the whole budget.
        tail: estimate what is not selected by clusters of 128 tokens (RetroInfer, 2025): 8 bytes a
            token and KV head more (of head_dim 128), and several times less error.
        certify: the share of attention that may be missed: where a sample does not rule out, with
            confidence 0.95, that a query head misses more, the step's budget in this layer is
            doubled, until it does (`engine.sparse.certified`). None looks at no sample.
        dense_layers: so many first layers attend to everything.
        attend_on: "host" attends where the KV lies; "device" fetches it to a buffer of `hot`
            times the budget there. "auto" takes the host if that is the model's device, too.
        prefetch: fetch ahead for the next layer with a guessed query: the next layer's own on
            this layer's input ("layer"), or that of the step before ("step"), whose tokens are
            there already unless the buffer is small: it spares the first step's fetches.
        distance: at which windowed indexes place all keys (A2ATS, 2025).
    """

    index: IndexName = "dense"
    options: dict[str, int | float | str] = {}
    keys: Literal[Numbers, "lowrank"] = "exact"
    rank: int = 160
    values: Numbers = "exact"
    budget: float = 2048
    sinks: int = 4
    window: int = 16
    reduce: Literal["max", "sum"] = "max"
    top_p: float | None = None
    tail: bool = False
    certify: float | None = None
    dense_layers: int = 0
    attend_on: Literal["auto", "host", "device"] = "auto"
    hot: float = 2.5
    prefetch: Literal["none", "step", "layer"] = "none"
    distance: int = 2048

    def __post_init__(self) -> None:
        if (said := wrong_name(self)) is not None:
            raise ConfigError(f"method.{said}")
        if not 0 < self.budget < inf or (self.budget >= 1 and self.budget != int(self.budget)):
            raise ConfigError(
                f"method.budget is a whole number of tokens, or a share below 1: {self.budget}"
            )
        if not 1 <= self.hot < inf:
            raise ConfigError(f"method.hot must be at least 1 (times the budget), got {self.hot}")
        for name in ("rank", "distance"):
            if not 1 <= (value := getattr(self, name)) < MOST:
                raise ConfigError(f"method.{name} must be at least 1, and below {MOST}: {value}")
        if self.certify is not None and not 0 < self.certify < 1:
            raise ConfigError(f"method.certify is a share between 0 and 1, got {self.certify}")
        if self.dense_layers < 0:
            raise ConfigError(f"method.dense_layers must not be negative: {self.dense_layers}")
        if self.keys == "lowrank" and self.attend_on == "host":
            raise ConfigError(
                'method.keys = "lowrank" rebuilds keys on the device: attend_on cannot be "host"'
            )
        self.policy(int(self.budget) if self.budget >= 1 else self.tokens(0))

    @property
    def sparse(self) -> bool:
        return self.index != "dense"

    @property
    def exact_rows(self) -> bool:
        """Whether a budget that holds all tokens makes it dense attention."""
        return self.keys == self.values == "exact" and self.top_p is None

    def tokens(self, prompt_tokens: int) -> int:
        """The budget for a prompt of this length; never less than what is always attended to."""
        asked = self.budget if self.budget >= 1 else self.budget * prompt_tokens
        return max(round(asked), self.sinks + self.window + 1)

    def fetches(self, elsewhere: bool) -> bool:
        """Whether rows are fetched to a buffer on the model's device.

        Args:
            elsewhere: the pool is on another device.
        """
        if self.attend_on != "auto":
            return self.attend_on == "device"
        return self.keys == "lowrank" or elsewhere

    def hot_slots(self, budget: int, positions: int) -> int:
        """Rows that a buffer on the device holds of a KV head, at a budget in tokens.

        Args:
            positions: that the model has: there are no more tokens.
        """
        return min(round(self.hot * budget) + self.window, positions)

    def policy(self, budget: int) -> Policy:
        """How tokens are selected. ConfigError names the setting that does not fit."""
        try:
            return Policy(budget, self.sinks, self.window, self.reduce, self.top_p)
        except ValueError as error:
            raise ConfigError(f"method: {error}") from error


PRESETS: dict[str, dict[str, Any]] = {
    "dense": {},
    "headrace": {"index": "scalar", "options": {"bits": 2}, "tail": True},
    "oracle": {"index": "exact"},
    "shadowkv": {
        "index": "landmarks",
        "options": {"chunk": 8, "outlier_chunks": 48},
        "keys": "lowrank",
        "attend_on": "device",
    },
    "a2ats": {"index": "vq"},
    "quest": {"index": "quest", "options": {"page": 16}},
    "pqcache": {"index": "pq", "options": {"subspaces": 16, "bits": 8}},
}


def preset(name: str, /, **changes: Any) -> Method:
    """The settings that go by a system's name, with changes. ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"no method {name!r}; there are {', '.join(PRESETS)}")
    unknown = changes.keys() - set(Method.__struct_fields__)
    if unknown:
        raise ConfigError(f"method has no setting {', '.join(sorted(unknown))}")
    try:
        return msgspec.convert(PRESETS[name] | changes, Method)
    except msgspec.ValidationError as error:
        said = str(error)  # ours name the method already
        raise ConfigError(said if said.startswith("method") else f"method: {said}") from error
