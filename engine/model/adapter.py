"""A LoRA adapter as PEFT saves it, merged into a model's weights when the model is loaded.

W becomes W + scale · B A (LoRA, Hu et al. 2022), computed in fp32 and rounded once, one layer at a
time; with DoRA (Liu et al. 2024) its rows are then brought to the lengths that were learned. After
that, a step costs what the plain model's does. Whatever of an adapter has no place here is refused
by its name: an adapter is applied as a whole, or not at all.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import ModelError
from engine.model.loader import read_json
from kvstore.identity import canonical_json, state_digest

N = TypeVar("N", int, float)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT calls the model that an adapter belongs to
A, B, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# of no consequence for what a trained adapter computes
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_core", "qalora_group_size", "eva_config"),
}
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the model's weights
REMEDY = "merge it into the model with PEFT (merge_and_unload), and serve that"


class Settings(msgspec.Struct, frozen=True):
    """What of `adapter_config.json` says how the tensors are to be used."""

    peft_type: str
    r: int = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    init_lora_weights: bool | str = True

    def scale(self, layer: str) -> float:
        """The factor on B A: alpha / r, or alpha / √r (rsLoRA, Kalajdzievski 2023)."""
        rank = self.rank(layer)
        return _matching(self.alpha_pattern, layer, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def rank(self, layer: str) -> int:
        return _matching(self.rank_pattern, layer, self.r)


@torch.no_grad()
def merge(module: nn.Module, folder: Path) -> tuple[str, bytes]:
    """Merge the adapter in `folder` into a model; its entry in `ModelIdentity.adapters`.

    Raises:
        ModelError: it is damaged, of another kind, or made for another model. The model must not be
            used then: some layers may be changed.
    """
    settings = _settings(folder)
    tensors = _tensors(folder)
    layers = _by_layer(folder, settings, tensors)
    _refuse_gaps(folder, settings, module, layers)
    for name, parts in layers.items():
        _merge_layer(_linear(folder, module, name), name, settings, parts)
    used = {name: settings.scale(name) for name in layers}
    whole = canonical_json({"scales": used, "dora": settings.use_dora}).encode()
    return "lora", sha256(whole + state_digest(tensors.items())).digest()


def _settings(folder: Path) -> Settings:
    found = read_json(folder / CONFIG, f"{folder} is no adapter folder")
    config = {name: value for name, value in found.items() if value is not None}
    try:
        settings = msgspec.convert(config, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ModelError(f"cannot read {folder / CONFIG}: {error}") from error
    if settings.peft_type != "LORA":
        raise ModelError(f"{folder} is a {settings.peft_type} adapter: only LORA is supported")
    known = HARMLESS | set(Settings.__struct_fields__)
    other = {k: v for k, v in config.items() if k not in known and v and v != "none"}
    if settings.init_lora_weights not in STARTS:  # PEFT takes their part off the model's weights
        other["init_lora_weights"] = settings.init_lora_weights
    if other:
        some = ", ".join(f"{name} = {str(value)[:40]}" for name, value in sorted(other.items()))
        raise ModelError(f"adapter {folder} asks for what is not supported: {some}; {REMEDY}")
    return settings


def _tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists():
        raise ModelError(
            f"weights missing: {folder} has no {WEIGHTS} (pickled .bin weights are not read: save "
            "the adapter as safetensors)"
        )
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {folder / WEIGHTS}: {error}") from error


def _by_layer(
    folder: Path, settings: Settings, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of every layer, all of them and no others."""
    needed = {A, B, LENGTHS} if settings.use_dora else {A, B}
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, kind = next(
            ((name.removesuffix(f".{kind}"), kind) for kind in needed if name.endswith(f".{kind}")),
            (name, None),
        )
        if kind is None or not layer.startswith(PREFIX):
            raise ModelError(f"adapter {folder} has a tensor of unknown use: {name}; {REMEDY}")
        layers[layer.removeprefix(PREFIX)][kind] = tensor
    if not layers:
        raise ModelError(f"adapter {folder} is empty: {WEIGHTS} holds no tensors")
    for layer, parts in layers.items():
        if missing := needed - set(parts):
            raise ModelError(
                f"adapter {folder} lacks {', '.join(sorted(missing))} of {layer}: copy it again"
            )
    return dict(sorted(layers.items()))


def _refuse_gaps(
    folder: Path, settings: Settings, module: nn.Module, layers: Mapping[str, Any]
) -> None:
    """ModelError if the config names layers of the model for which there are no tensors."""
    if not isinstance(settings.target_modules, list):
        return  # a pattern, of which the tensors are what was found
    for target in settings.target_modules:
        ends = f".{target}"
        meant = any(f".{name}".endswith(ends) for name, _ in module.named_modules())
        if meant and not any(f".{name}".endswith(ends) for name in layers):
            raise ModelError(
                f"adapter {folder} lacks the tensors of {target}, which its {CONFIG} names: copy "
                "it again"
            )


def _linear(folder: Path, module: nn.Module, name: str) -> nn.Linear:
    try:
        found = module.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"adapter {folder} was made for another model: this one has no layer {name}"
        ) from error
    if not isinstance(found, nn.Linear):
        raise ModelError(
            f"adapter {folder} changes {name}, a {type(found).__name__}: only linear layers are "
            "supported"
        )
    return found


def _merge_layer(
    linear: nn.Linear, name: str, settings: Settings, parts: Mapping[str, Tensor]
) -> None:
    """A new weight for a layer: one that it shared with another (a tied head) stays the other's."""
    rank, (rows, columns) = settings.rank(name), linear.weight.shape
    shapes = {A: (rank, columns), B: (rows, rank), LENGTHS: (rows,)}
    for kind, part in parts.items():
        if tuple(part.shape) != shapes[kind]:
            raise ModelError(
                f"the adapter does not fit: {name}.{kind} is {list(part.shape)}, this model and "
                f"{CONFIG} (rank {rank}) need {list(shapes[kind])}"
            )
    wide = {kind: part.to(linear.weight.device).float() for kind, part in parts.items()}
    weight = torch.addmm(linear.weight.float(), wide[B], wide[A], alpha=settings.scale(name))
    if settings.use_dora:
        weight *= (wide[LENGTHS] / weight.norm(dim=1))[:, None]
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


def _matching(patterns: Mapping[str, N], layer: str, otherwise: N) -> N:
    """The value whose pattern is the end of a layer's name, the first in order as PEFT has it."""
    found = (v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, otherwise)
