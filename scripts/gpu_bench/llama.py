"""A model of the shape of Llama-3.1-8B, with random weights made where they are used."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

LAYERS = 32
POSITIONS = 1 << 20  # so that 512k tokens have a place; the frequencies are those of 128k
SIZES: tuple[Any, ...] = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(device: torch.device, layers: int = LAYERS) -> PreTrainedModel:
    """In bf16; on a CPU a toy of the same family, in fp32."""
    torch.manual_seed(0)
    real = device.type == "cuda"
    sizes: tuple[int, ...] = (
        (layers, 4096, 14336, 32, 8, 128256) if real else (2, 128, 128, 4, 2, 256)
    )
    config = LlamaConfig(
        **dict(zip(SIZES, sizes, strict=True)),
        max_position_embeddings=POSITIONS,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if real else torch.float32
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def weight_bytes(module: PreTrainedModel) -> int:
    """Of all parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(x.nbytes for x in tensors)
