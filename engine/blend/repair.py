"""How reused chunks are repaired: what a user may set, and what became of a request."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from engine.blend.policies import Boundary, Deviation, Policy, Query, Reposition, Union
from engine.errors import ConfigError
from kvstore.names import wrong_name

PolicyName = Literal["reposition", "boundary", "deviation", "query", "union"]


class BlendConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings for prompts made of `Segments`.

    Args:
        policy: which reused tokens are computed afresh; see `engine.blend.policies`.
        share: of the reused tokens, on average over the layers, probes and checks included. 1
            computes everything.
        boundary_tokens: of every chunk's start, which `union` repairs first.
        reorder: chunks may be read in another order if more of the prompt is then stored exactly.
        keep_repaired: store what a blend made, under a name that only the same request asks for.
        controller: load or compute by measured speeds, and raise the share as far as loading hides
            it. False loads always, and repairs the share asked for.
    """

    policy: PolicyName = "union"
    share: float = 0.2
    boundary_tokens: int = 16
    reorder: bool = False
    keep_repaired: bool = False
    controller: bool = True

    def __post_init__(self) -> None:
        if (said := wrong_name(self)) is not None:
            raise ConfigError(f"blend.{said}")
        msgspec.structs.force_setattr(self, "share", float(self.share))  # 1 is 1.0
        if not 0 <= self.share <= 1:
            raise ConfigError(f"blend.share is a share from 0 to 1, got {self.share}")
        if self.boundary_tokens < 0:
            raise ConfigError(
                f"blend.boundary_tokens must not be negative, got {self.boundary_tokens}"
            )

    def chosen(self, num_layers: int) -> Policy:
        """The policy that goes by the name, for a model of so many layers."""
        if self.policy == "union":
            return Union(num_layers // 2, self.boundary_tokens)
        made = {
            "reposition": Reposition,
            "boundary": Boundary,
            "deviation": Deviation,
            "query": Query,
        }
        return made[self.policy]()


@dataclass(slots=True)
class BlendReport:
    """What a blend reused and computed.

    Args:
        policy: that ran; `reason` says why, where it is not the one asked for.
        prompt_tokens: exact_tokens + reused_tokens + fresh_tokens.
        exact_tokens: whose stored KV is that of a full prefill: a prefix of the prompt, and
            the chunk behind the instructions.
        reused_tokens: of other chunks; a share of them, `charged`, was computed afresh.
        repaired_tokens: of exact_tokens, those that an earlier blend repaired.
        fresh_tokens: without stored KV: the question, separators, what ends no block.
        chunks, missed, corrupt: of the prompt; not in the store; there, but not readable.
        order: of the chunks as they were read, by their numbers in the request.
        loaded: whether KV of chunks was used; `reason` says why, or why not.
        share, charged: of reused tokens that are computed: asked for or decided, and spent.
        load_s, waited_s, compute_s: of the loading thread, of the loop for it, of all the rest.
    """

    policy: str = ""
    prompt_tokens: int = 0
    exact_tokens: int = 0
    repaired_tokens: int = 0
    reused_tokens: int = 0
    fresh_tokens: int = 0
    chunks: int = 0
    missed: int = 0
    corrupt: int = 0
    order: tuple[int, ...] = ()
    loaded: bool = False
    reason: str = ""
    share: float = 0.0
    charged: float = 0.0
    load_s: float = 0.0
    waited_s: float = 0.0
    compute_s: float = 0.0
