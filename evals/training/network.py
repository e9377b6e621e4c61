"""The network as it is trained: a Llama (RoPE, GQA, RMSNorm, SwiGLU), and its export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; the defaults have 5.6 million parameters."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 320
    theta: float = 1e8
    positions: int = 32_768


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-5)


class Attention(nn.Module):
    """Causal attention; `hidden` marks what a query may not see besides the future."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        inner, outer = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, inner, bias=False)
        self.k_proj = nn.Linear(shape.width, outer, bias=False)
        self.v_proj = nn.Linear(shape.width, outer, bias=False)
        self.o_proj = nn.Linear(inner, shape.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, bias: Float[Tensor, "B 1 T T"] | None
    ) -> Float[Tensor, "B T d"]:
        batch, tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if bias is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # on short windows quicker than the fused kernel on a CPU
            scores = (q * self.shape.head_dim**-0.5) @ k.transpose(-1, -2) + bias
            mixed = torch.softmax(scores, -1, dtype=scores.dtype) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer, its parts named as in `transformers`."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)
        self.input_layernorm = Norm(shape.width)
        self.post_attention_layernorm = Norm(shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """Random weights of a Llama; `wire` gives some of them a meaning."""

    inverse: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.register_buffer("inverse", frequencies(shape), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                small = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=small * weight.shape[1] ** -0.5)
        with torch.no_grad():
            self.lm_head.weight.copy_(0.05 * self.embed_tokens.weight)

    def blocks(self) -> list[Layer]:
        """The layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        hidden: Bool[Tensor, "B T T"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Normed states of the last layer; `lm_head` makes logits of them.

        Args:
            hidden: keys (last) that a query must not see, besides those after it.
        """
        angles = positions[:, None, :, None].float() * self.inverse
        kind = torch.get_autocast_dtype(ids.device.type)
        kind = kind if torch.is_autocast_enabled(ids.device.type) else torch.float32
        x = F.embedding(ids, self.embed_tokens.weight.to(kind))
        bias = None if hidden is None else _bias(hidden, kind)
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        for layer in self.blocks():
            x = layer(x, cos, sin, bias)
        return self.norm(x)


def frequencies(shape: Shape) -> Float[Tensor, " half"]:
    """RoPE's angle per token, of each pair of a head's dimensions."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    return (shape.theta**-exponents).float()


def export(network: Network, tokenizer: Any, folder: Path, *, sharpness: float = 1.0) -> None:
    """Write the network as a bf16 `LlamaForCausalLM` with its tokenizer.

    Args:
        sharpness: what attention's scores are multiplied by, as a part of the queries' weights.
    """
    shape = network.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    model.bfloat16()
    model.load_state_dict(
        {
            name if name.startswith("lm_head") else f"model.{name}": (
                weight * sharpness if ".q_proj." in name else weight
            )
            for name, weight in network.state_dict().items()
        }
    )
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Network:
    """The network of a folder that `export` wrote, in fp32.

    Raises:
        ConfigError: the folder holds no such model.
    """
    try:
        config: Any = LlamaConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
    except OSError as error:
        raise ConfigError(f"no model in {folder}: {error}") from error
    shape = Shape(
        vocabulary=config.vocab_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp=config.intermediate_size,
        theta=config.rope_parameters["rope_theta"],
        positions=config.max_position_embeddings,
    )
    network = Network(shape)
    network.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return network


def _bias(hidden: Bool[Tensor, "B T T"], kind: torch.dtype) -> Float[Tensor, "B 1 T T"]:
    future = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).triu_(1)
    bias = torch.zeros(hidden.shape, dtype=kind, device=hidden.device)
    return bias.masked_fill_(hidden | future, float("-inf"))[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys turned by the angles of their positions (RoPE, halves as pairs)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
