"""Small random models of every family, with the features that break engines."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    initializer_range=0.12,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=256)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)

# name -> (model type, what differs from SMALL). GQA unless said otherwise.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-llama3": ("llama", dict(num_key_value_heads=4, rope_parameters=LLAMA3)),
    "llama-mqa-128": ("llama", dict(num_key_value_heads=1, head_dim=128)),
    "llama-80-linear": ("llama", dict(head_dim=80, rope_parameters=LINEAR)),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral-window": ("mistral", dict(sliding_window=24)),
    "qwen2-yarn": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2-window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=20, max_window_layers=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=128)),
    "qwen3-moe": ("qwen3_moe", MOE),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "phi3-partial": (
        "phi3",
        dict(
            hidden_size=4 * 80,
            initializer_range=0.066,  # logits as large as in the narrower models
            head_dim=80,
            sliding_window=40,
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75
            ),
        ),
    ),
    "gemma2": ("gemma2", dict(sliding_window=32, query_pre_attn_scalar=48)),
    "gemma3": (
        "gemma3_text",
        dict(
            num_hidden_layers=4,
            sliding_window=16,
            query_pre_attn_scalar=80,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "gemma3n": (  # three layers that make KV, and three that share it
        "gemma3n_text",
        dict(
            num_hidden_layers=6,
            num_kv_shared_layers=3,
            layer_types=["sliding_attention", "full_attention"] * 3,
            sliding_window=16,
            vocab_size_per_layer_input=211,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            altup_num_inputs=3,
            altup_active_idx=1,
            activation_sparsity_pattern=[0.9, 0.5] + [0.0] * 4,
        ),
    ),
    "glm4": ("glm4", dict(head_dim=80, attention_bias=True)),
    "olmo2": ("olmo2", dict(num_key_value_heads=4)),
    "olmo2-gqa": ("olmo2", dict(head_dim=80)),
}


def build(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model; the same every time, with every norm and bias away from its start value."""
    kind, special = CASES[name]
    config = AutoConfig.for_model(kind, **(SMALL | special | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += torch.randn_like(weight) * 0.1
    return model


def prompt(length: int, *, vocab: int = 211, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    return torch.randint(3, vocab, (length,), generator=generator)


def every_family(function: Callable[..., None]) -> Callable[..., None]:
    """Run a test once per case."""
    import pytest

    return pytest.mark.parametrize("family", CASES)(function)
