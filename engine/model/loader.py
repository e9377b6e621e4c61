"""From a path or a hub id to a loaded `transformers` model, or one clear line."""

import json
import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine.errors import ModelError
from engine.model.hf import FAMILIES
from kvstore.identity import DTYPES

log = logging.getLogger(__name__)

HARMLESS = ("rotary_emb.inv_freq", "lm_head.weight")  # computed; tied
FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


def locate(path_or_id: str | Path, what: str = "model") -> Path:
    """The folder of a model: the name of one that comes with the project, a path, or a hub id.

    Args:
        what: else, in the words of an error.
    """
    if not str(path_or_id):
        raise ModelError(f"the {what} has no name: give a folder or a hub id")
    folders = [Path(path_or_id)]
    if re.fullmatch(r"[\w-]+", str(path_or_id)):  # a name alone: "." and ".." are paths
        package = Path(__file__).parents[1]
        folders[:0] = (root / "models" / path_or_id for root in (package, package.parent))
    for folder in folders:
        if folder.is_dir():
            return folder
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{what} not found: {path_or_id} is neither a folder nor a {what} that the hub gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` would load, all shards. ModelError if one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} names no shards: it needs a weight_map")
        files = [folder / str(name) for name in sorted(set(shards.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ModelError(
            f"weights missing: {folder} has no {', '.join(missing)} (pickled .bin weights are not "
            "read: convert them to safetensors)"
        )
    return files


def load_module(
    folder: Path, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """The model in `folder`, on `device`, in `dtype` (None: the checkpoint's, see `_dtype`)."""
    if (folder / "adapter_config.json").exists():  # which transformers may apply or not
        raise ModelError(
            f"{folder} holds an adapter: load the model that it belongs to, with adapter={folder}"
        )
    config = read_json(folder / "config.json")
    _refuse_config(config)
    if (generation := folder / "generation_config.json").exists():
        read_json(generation)  # transformers goes on without a broken one, and no text would end
    weight_files(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_dtype(dtype, config, device),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
        module, info = loaded
        module = module.to(device).eval()
    except Exception as error:  # what a broken checkpoint makes of three libraries has no end
        raise ModelError(f"cannot load {folder}: {_reason(error)}") from error
    _refuse_tensors(folder, info)
    return cast(PreTrainedModel, module)


def _refuse_tensors(folder: Path, info: dict[str, Any]) -> None:
    """ModelError unless the weights are those that the config describes, no more and no less."""
    if info["mismatched_keys"]:
        some = ", ".join(sorted(str(key[0]) for key in info["mismatched_keys"])[:3])
        raise ModelError(
            f"cannot load {folder}: {some}... have another shape than config.json says"
        )
    surplus = [k for k in info["unexpected_keys"] if not k.endswith(HARMLESS)]
    if surplus:
        some = ", ".join(sorted(surplus)[:3])
        raise ModelError(
            f"cannot load {folder}: config.json has no place for {len(surplus)} tensors ({some}...)"
        )
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"weights missing: {folder} lacks {len(info['missing_keys'])} tensors ({some}...): "
            "download the checkpoint again"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; None where there is none."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above: tokenizers raises it itself for what it does not know
        raise ModelError(f"cannot load the tokenizer of {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error of another library in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pick_device(device: str | torch.device | None) -> torch.device:
    """One device: what is asked for, else a GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(
            f"device {device!r}: one device is needed, cpu or cuda[:N]; several GPUs are not "
            "supported"
        ) from error
    if picked.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r}: cpu or cuda is needed")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch finds no GPU here; use device='cpu'")
    return picked


def refuse_module(module: PreTrainedModel) -> None:
    """ModelError for a loaded model that is quantized, of another dtype than KV may be, or spread
    over several devices."""
    _refuse_config(module.config.to_dict())
    if getattr(module, "_hf_peft_config_loaded", False) or hasattr(module, "peft_config"):
        raise ModelError(
            "adapters of a loaded module are not supported: merge them into its weights first, or "
            "give Engine.from_pretrained the model's folder, and the adapter's as adapter="
        )
    if module.dtype not in DTYPES.values():
        raise ModelError(
            f"weights in {module.dtype} are not supported: load them with dtype {', '.join(DTYPES)}"
        )
    devices = {str(weight.device) for weight in module.parameters()}
    if len(devices) > 1:
        raise ModelError(
            f"the model lies on {', '.join(sorted(devices))}: several devices are not supported; "
            "load it on one"
        )


def _refuse_config(config: dict[str, Any]) -> None:
    if other := config.get("transformers_weights"):
        raise ModelError(
            f"weights in {other} (transformers_weights) are not supported: rename them"
        )
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"unknown architecture {kind!r}: known are {', '.join(sorted(FAMILIES))}")
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, dict)
        method = quantization.get("quant_method") if named else quantization
        raise ModelError(
            f"quantized checkpoints ({method}) are not supported: use the unquantized weights"
        )


def _dtype(asked: torch.dtype | None, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """`asked`, else the checkpoint's; but what a CPU has no instructions for becomes fp32.

    Matrix products in fp16, or in bf16 without AVX512-BF16 or AMX, run at 1 GFLOP/s where fp32
    reaches 50 a core (two machines, torch 2.13), so such a checkpoint is widened, and it is said.
    """
    if asked is not None:
        return asked
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"cannot load it: config.json names the dtype {name!r}, which torch lacks")
    if device.type != "cpu" or found == torch.float32:
        return found
    if found == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return found
    log.warning("%s weights are computed in float32 on this CPU; pass dtype to choose", name)
    return torch.float32


def read_json(path: Path, without: str | None = None) -> dict[str, Any]:
    """What a file holds, one JSON object. ModelError for all else, beginning with `without` if it
    is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ModelError(f"cannot read {path}: it is no JSON object")
        return found
    except FileNotFoundError as error:
        raise ModelError(
            f"{without or f'{path.parent} is no model folder'}: it has no {path.name}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
