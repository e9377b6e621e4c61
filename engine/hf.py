"""Pieces borrowed from a loaded `transformers` model: its weights, its modules, its frequencies.

What differs between families is where the norms stand and how q, k and v are made; `FAMILIES`
says it in one line each, and `engine.check` proves it against the model's own forward.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import ModelError
from engine.linear import borrowed, borrowed_norm
from engine.model import QKV, AttentionSpec, Shape
from engine.rope import Rope


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a decoder layer's norms (None: there is none), and the shape of its attention.

    Args:
        qk_norm: RMS norm of q and k per "head", or over the whole projected "row".
        interleaved: rotary pairs are neighbours (GLM), not halves.
        fused_qkv: one `qkv_proj` makes all three.
        plain_norm: norms are Llama's, rounded where it rounds; others run as the module has them.
        softcap: the layer caps attention scores with `attn_logit_softcapping`.
    """

    attn_in: str | None = "input_layernorm"
    attn_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    qk_norm: Literal["head", "row"] | None = None
    interleaved: bool = False
    fused_qkv: bool = False
    plain_norm: bool = True
    softcap: bool = False


_GEMMA = Family(
    plain_norm=False,
    attn_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "phi3": Family(fused_qkv=True),
    "gemma2": replace(_GEMMA, softcap=True),
    "gemma3_text": replace(_GEMMA, qk_norm="head"),
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

Norm = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def norm_of(module: nn.Module, family: Family) -> Norm:
    """A norm of the model; in compiled code where its family's can be."""
    return borrowed_norm(module) if family.plain_norm else module


class HFLayer:
    """One decoder layer's modules, in the order its family runs them."""

    def __init__(
        self, module: Any, family: Family, attention: AttentionSpec, rope: Rope, head_dim: int
    ) -> None:
        self.module, self.attention, self.rope = module, attention, rope
        self._attn: Any = borrowed(module.self_attn)
        self._mlp: Any = borrowed(module.mlp)
        self._family, self._head_dim = family, head_dim
        if family.qk_norm is not None:
            self._q_norm = norm_of(module.self_attn.q_norm, family)
            self._k_norm = norm_of(module.self_attn.k_norm, family)
        self._attn_in, self._attn_out, self._mlp_in, self._mlp_out = (
            self._norm(name)
            for name in (family.attn_in, family.attn_out, family.mlp_in, family.mlp_out)
        )

    def qkv(self, x: Float[Tensor, "N E"]) -> QKV:
        """Projections of N tokens, normalised where the model does, unrotated."""
        q, k, v = self._project(self._attn_in(x))
        if self._family.qk_norm == "row":
            q, k = self._q_norm(q), self._k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in (q, k, v))
        if self._family.qk_norm == "head":
            q, k = self._q_norm(q), self._k_norm(k)
        return QKV(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))

    def finish(
        self, x: Float[Tensor, "N E"], heads: Float[Tensor, "Hq N D"]
    ) -> Float[Tensor, "N E"]:
        """The layer's output: `x` plus what the attended heads and the MLP add."""
        x = x + self._attn_out(self._attn.o_proj(heads.transpose(0, 1).flatten(1)))
        return x + self._mlp_out(self._mlp(self._mlp_in(x)[None])[0])

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        if not self._family.fused_qkv:
            return self._attn.q_proj(x), self._attn.k_proj(x), self._attn.v_proj(x)
        qkv, kv = self._attn.qkv_proj(x), self._attn.num_key_value_heads * self._head_dim
        return qkv.split([qkv.shape[-1] - 2 * kv, kv, kv], -1)

    def _norm(self, name: str | None) -> Norm:
        return _same if name is None else norm_of(getattr(self.module, name), self._family)


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
        turns = ropes(self._body, self.config, family)
        self.shape = _shape(self.config, module, turns)
        specs = attention_specs(self._body.layers, self.config, family)
        self.layers = [
            HFLayer(layer, family, spec, rope, self.shape.head_dim)
            for layer, spec, rope in zip(self._body.layers, specs, turns, strict=True)
        ]

    @property
    def eos(self) -> frozenset[int]:
        """The tokens that end a text, as the model's `generate()` understands them."""
        found = self.module.generation_config.eos_token_id if self.module.can_generate() else None
        return frozenset([found] if isinstance(found, int) else found or ())

    @property
    def static_shapes(self) -> bool:
        """False with experts: how many tokens each gets is known when they are routed."""
        names = ("num_experts", "num_local_experts")
        return not any(getattr(self.config, name, None) for name in names)

    def embed(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "N E"]:
        """Token embeddings, scaled where the model scales them."""
        return self._body.embed_tokens(tokens[None])[0]

    def logits(self, x: Float[Tensor, "N E"]) -> Float[Tensor, "N vocab"]:
        """Next-token logits of the last layer's output."""
        out = self._head(self._norm(x))
        return out if self._softcap is None else self._softcap * torch.tanh(out / self._softcap)


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


def attention_specs(layers: Iterable[Any], config: Any, family: Family) -> list[AttentionSpec]:
    """Scale, softcap and window of every layer."""
    window = getattr(config, "sliding_window", None)
    return [
        AttentionSpec(
            scale=layer.self_attn.scaling,
            softcap=config.attn_logit_softcapping if family.softcap else None,
            window=None if kind == "full_attention" else window,
        )
        for layer, kind in zip(layers, layer_types(config), strict=True)
    ]


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


def _shape(config: Any, module: Any, turns: Sequence[Rope]) -> Shape:
    weight = module.model.layers[0].self_attn.o_proj.weight
    head_dim = getattr(config, "head_dim", None)
    return Shape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        max_positions=min(
            [config.max_position_embeddings, *(r.max_positions for r in turns if r.max_positions)]
        ),
        dtype=weight.dtype,
        device=weight.device,
    )
