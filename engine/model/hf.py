"""Pieces borrowed from a loaded `transformers` model: its weights, its modules, its frequencies.

What differs between families is where the norms stand and how q, k and v are made; `FAMILIES`
says it in one line each, and `engine.model.check` proves it against the model's own forward.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from numbers import Integral
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import ModelError
from engine.model.altup import AltUpLayer, Streams
from engine.model.hf_layer import Family, HFLayer, Place, norm_of
from engine.model.linear import borrowed
from engine.model.pieces import AttentionSpec, Shape
from engine.model.rope import Rope
from retrieval.capped import capped

_GEMMA = Family(
    plain_norm=False,
    attn_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    windowed="some",
)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windowed="all"),
    "mixtral": Family(windowed="all"),
    "qwen2": Family(windowed="some"),
    "qwen3": Family(qk_norm="head", windowed="some"),
    "qwen3_moe": Family(qk_norm="head", windowed="all"),
    "phi3": Family(fused_qkv=True, windowed="all"),
    "gemma2": replace(_GEMMA, softcap=True),
    "gemma3_text": replace(_GEMMA, qk_norm="head"),
    "gemma3n_text": replace(_GEMMA, qk_norm="head", v_norm=True, altup=True),
    "glm4": Family(
        attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm", interleaved=True
    ),
    "olmo2": Family(
        attn_in=None,
        attn_out="post_attention_layernorm",
        mlp_in=None,
        mlp_out="post_feedforward_layernorm",
        qk_norm="row",
        plain_norm=False,
    ),
}
AnyLayer = HFLayer | AltUpLayer


class HFModel:
    """A `transformers` causal language model as pieces. Its forward is never called here."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module: Any = module
        self.config: Any = module.config
        family = family_of(self.config)
        self._body: Any = module.model
        self._norm = norm_of(self._body.norm, family)
        self._head: Any = borrowed(module.lm_head)
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        _eos(module)  # refused here, not behind a prompt
        self.streams = Streams(self._body) if family.altup else None
        turns = ropes(self._body, self.config, family)
        owns = ownership(self._body.layers, self.config)
        self.shape = _shape(self.config, module, turns, sum(own for _, own in owns))
        specs = attention_specs(self._body.layers, self.config, family)
        places = [
            Place(spec, rope, self.shape.head_dim, *own)
            for spec, rope, own in zip(specs, turns, owns, strict=True)
        ]
        _refuse_unequal(places)
        plain = [HFLayer(*x) for x in zip(self._body.layers, repeat(family), places)]
        self.layers: Sequence[AnyLayer] = (
            [AltUpLayer(layer, i) for i, layer in enumerate(plain)] if family.altup else plain
        )

    @property
    def around(self) -> tuple[list[nn.Embedding], list[nn.Module]]:
        """Tables of embeddings, and what else computes before the layers or between norm and them.

        For the load-time check.
        """
        if self.streams is not None:
            return self.streams.tables, self.streams.modules
        return [self._body.embed_tokens], []

    @property
    def eos(self) -> frozenset[int]:
        """The tokens that end a text, as the model's `generate()` understands them by now."""
        return _eos(self.module)

    @property
    def static_shapes(self) -> bool:
        """False with experts: how many tokens each gets is known when they are routed.

        And where a step makes tensors of numbers, as Gemma 3n's sparse MLPs do.
        """
        names = ("num_experts", "num_local_experts")
        return self.streams is None and not any(getattr(self.config, name, None) for name in names)

    def embed(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """Token embeddings, scaled where the model scales them."""
        if self.streams is not None:
            return self.streams.begin(tokens)
        return self._body.embed_tokens(tokens[None])[0]

    def logits(self, x: Float[Tensor, "N E"]) -> Float[Tensor, "N vocab"]:
        """Next-token logits of the last layer's output."""
        out = self._head(self._norm(x if self.streams is None else self.streams.end(x)))
        return capped(out, self._softcap)


def _eos(module: Any) -> frozenset[int]:
    """The tokens that end a text, as the model's `generate()` understands them."""
    found = module.generation_config.eos_token_id if module.can_generate() else None
    ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
    if not all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids):
        raise ModelError(f"eos_token_id must be a token id, or a list of them, got {found!r}")
    return frozenset(map(int, ids))


def family_of(config: Any) -> Family:
    """The family of a model's config. ModelError if there is none."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"unknown architecture {config.model_type!r}: known are {', '.join(sorted(FAMILIES))}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("use_bidirectional_attention: only causal language models are served")
    return FAMILIES[config.model_type]


def layer_types(config: Any) -> list[str | None]:
    """What `transformers` calls each layer; None where a model has one kind only."""
    return list(getattr(config, "layer_types", None) or [None] * config.num_hidden_layers)


def ownership(layers: Iterable[Any], config: Any) -> list[tuple[int, bool]]:
    """Of every layer, the number of the KV that it attends to, and whether it makes it.

    A layer without KV of its own takes that of the last layer of its kind that has some (Gemma 3n).
    """
    found: list[tuple[int, bool]] = []
    newest: dict[str | None, int] = {}
    for layer, kind in zip(layers, layer_types(config), strict=True):
        owns = not getattr(layer.self_attn, "is_kv_shared_layer", False)
        if owns:
            newest[kind] = sum(own for _, own in found)
        found.append((newest[kind], owns))
    return found


def _refuse_unequal(places: Sequence[Place]) -> None:
    """ModelError for layers that share KV and attend to it in different ways."""
    first: dict[int, Place] = {}
    for number, place in enumerate(places):
        like = first.setdefault(place.owner, place)
        if (place.attention, place.rope) != (like.attention, like.rope):
            raise ModelError(
                f"layer {number} attends to another layer's KV with a scale, a window or rotary "
                "frequencies of its own: this is not supported"
            )


def attention_specs(layers: Iterable[Any], config: Any, family: Family) -> list[AttentionSpec]:
    """Scale, softcap and window of every layer."""
    return [
        AttentionSpec(
            scale=layer.self_attn.scaling,
            softcap=config.attn_logit_softcapping if family.softcap else None,
            window=config.sliding_window if _windowed(family, kind) else None,
        )
        for layer, kind in zip(layers, layer_types(config), strict=True)
    ]


def _windowed(family: Family, kind: str | None) -> bool:
    """Whether a layer of this kind sees a window only."""
    return family.windowed == "all" or (family.windowed == "some" and kind == "sliding_attention")


def ropes(body: Any, config: Any, family: Family) -> list[Rope]:
    """The rotation of every layer, from the model's rotary module; equal ones are one object."""
    made: dict[str | None, Rope] = {}
    own_tables = not hasattr(body.rotary_emb, "inv_freq")  # one set a layer type (Gemma 3)
    for kind in layer_types(config):
        name = kind if own_tables else None
        if name not in made:
            made[name] = _rope(body.rotary_emb, config, name, family.interleaved)
    return [made[kind if own_tables else None] for kind in layer_types(config)]


def _rope(rotary: Any, config: Any, kind: str | None, interleaved: bool) -> Rope:
    prefix = "" if kind is None else f"{kind}_"
    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    return Rope(
        inv_freq=getattr(rotary, f"{prefix}original_inv_freq").double(),
        scaling=float(getattr(rotary, f"{prefix}attention_scaling")),
        interleaved=interleaved,
        max_positions=_switch(parameters, config),
    )


def _switch(parameters: dict[str, Any], config: Any) -> int | None:
    """The length at which the frequencies would change; None where they never do."""
    if "dynamic" in parameters["rope_type"]:
        return int(config.max_position_embeddings)
    if parameters["rope_type"] == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return None


def _shape(config: Any, module: Any, turns: Sequence[Rope], num_layers: int) -> Shape:
    weight = module.model.layers[0].self_attn.o_proj.weight
    head_dim = getattr(config, "head_dim", None)
    positions = [config.max_position_embeddings, *(r.max_positions for r in turns)]
    if (most := min(n for n in positions if n is not None)) < 1:
        raise ModelError(f"a model of {most} positions (max_position_embeddings) reads no prompt")
    return Shape(
        num_layers=num_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        max_positions=most,
        dtype=weight.dtype,
        device=weight.device,
    )
