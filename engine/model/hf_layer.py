"""One decoder layer of a `transformers` model as pieces, and what differs between families."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from engine.model.linear import borrowed, borrowed_norm
from engine.model.pieces import QKV, AttentionSpec
from engine.model.rope import Rope


@dataclass(frozen=True, slots=True)
class Family:
    """Names of a decoder layer's norms (None: there is none), and the shape of its attention.

    Args:
        qk_norm: RMS norm of q and k per "head", or over the whole projected "row".
        v_norm: values are normed per head, too.
        interleaved: rotary pairs are neighbours (GLM), not halves.
        fused_qkv: one `qkv_proj` makes all three.
        plain_norm: norms are Llama's, rounded where it rounds; others run as the module has them.
        softcap: the layer caps attention scores with `attn_logit_softcapping`.
        windowed: which layers have the config's `sliding_window`: "all", or "some" as `layer_types`
            says. None where no layer has one: a config may name what its family does not look at.
        altup: several streams go through the layers; see `engine.model.altup`.
    """

    attn_in: str | None = "input_layernorm"
    attn_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None
    qk_norm: Literal["head", "row"] | None = None
    v_norm: bool = False
    interleaved: bool = False
    fused_qkv: bool = False
    plain_norm: bool = True
    softcap: bool = False
    windowed: Literal["all", "some"] | None = None
    altup: bool = False


Norm = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def norm_of(module: nn.Module, family: Family) -> Norm:
    """A norm of the model; in compiled code where its family's can be."""
    return borrowed_norm(module) if family.plain_norm else module


@dataclass(frozen=True, slots=True)
class Place:
    """What a layer has of the model around it; see `engine.model.pieces.Layer`."""

    attention: AttentionSpec
    rope: Rope
    head_dim: int
    owner: int
    owns: bool


class HFLayer:
    """One decoder layer's modules, in the order its family runs them."""

    def __init__(self, module: Any, family: Family, place: Place) -> None:
        self.module, self.attention, self.rope = module, place.attention, place.rope
        self.owner, self.owns = place.owner, place.owns
        self._attn: Any = borrowed(module.self_attn)
        self._mlp: Any = borrowed(module.mlp)
        self._family, self._head_dim = family, place.head_dim
        self._q_norm: Norm = _same
        self._k_norm: Norm = _same
        if family.qk_norm is not None:
            self._q_norm = norm_of(module.self_attn.q_norm, family)
        if family.qk_norm is not None and self.owns:
            self._k_norm = norm_of(module.self_attn.k_norm, family)
        self._attn_in, self._attn_out, self._mlp_in, self._mlp_out = (
            self._norm(name)
            for name in (family.attn_in, family.attn_out, family.mlp_in, family.mlp_out)
        )

    def qkv(self, x: Float[Tensor, "N E"]) -> QKV:
        """Projections of N tokens, normalised where the model does, unrotated."""
        q, *kv = self._project(self._attn_in(x))
        q = self._heads(q, self._q_norm)
        if not kv:
            return QKV(q, *(q.new_empty(0, *q.shape[1:]),) * 2)
        k, v = kv[0], kv[1].unflatten(-1, (-1, self._head_dim))
        if self._family.v_norm:
            v = self._attn.v_norm(v)
        return QKV(q, self._heads(k, self._k_norm), v.transpose(0, 1))

    def finish(
        self, x: Float[Tensor, "N E"], heads: Float[Tensor, "Hq N D"]
    ) -> Float[Tensor, "N E"]:
        """The layer's output: `x` plus what the attended heads and the MLP add."""
        x = x + self.attended(heads)
        return x + self.fed(x)

    # the parts of it

    def normed(self, x: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """What the projections read."""
        return self._attn_in(x)

    def attended(self, heads: Float[Tensor, "Hq N D"]) -> Float[Tensor, "N E"]:
        """What attention adds."""
        return self._attn_out(self._attn.o_proj(heads.transpose(0, 1).flatten(1)))

    def fed(self, x: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """What the MLP adds."""
        return self._mlp_out(self._mlp(self._mlp_in(x)[None])[0])

    # for the load-time check

    def given(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], embedded: Float[Tensor, "N E"]
    ) -> Float[Tensor, "N E"]:
        """What a call of the module begins with, as `qkv` takes it."""
        return (args[0] if args else kwargs["hidden_states"])[0].float()

    def made(self, output: Any, x: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """What the module made of it, as `finish` returns it."""
        return (output[0] if isinstance(output, tuple) else output)[0]

    def _heads(self, rows: Float[Tensor, "N HD"], norm: Norm) -> Float[Tensor, "H N D"]:
        """Queries or keys, normed as the family does it."""
        if self._family.qk_norm == "row":
            rows = norm(rows)
        heads = rows.unflatten(-1, (-1, self._head_dim))
        if self._family.qk_norm == "head":
            heads = norm(heads)
        return heads.transpose(0, 1)

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """All queries; and keys and values where the layer makes them."""
        if not self.owns:
            return [self._attn.q_proj(x)]
        if not self._family.fused_qkv:
            return self._attn.q_proj(x), self._attn.k_proj(x), self._attn.v_proj(x)
        qkv, kv = self._attn.qkv_proj(x), self._attn.num_key_value_heads * self._head_dim
        return qkv.split([qkv.shape[-1] - 2 * kv, kv, kv], -1)

    def _norm(self, name: str | None) -> Norm:
        return _same if name is None else norm_of(getattr(self.module, name), self._family)
