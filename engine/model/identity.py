"""What a model's KV depends on, for the store."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from engine.model.hf import HFModel
from engine.model.loader import weight_files
from kvstore.identity import ModelIdentity, state_digest, weights_digest
from native.folders import cache_folder

log = logging.getLogger(__name__)

SEMANTICS = 2  # raise when the same weights come to mean other KV
IGNORED = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


def identity(
    model: HFModel, folder: Path | None, adapters: tuple[tuple[str, bytes], ...] = ()
) -> ModelIdentity:
    """Identity of a model loaded from `folder`, or of the module itself where there is none.

    Args:
        adapters: what was merged into the weights since they were loaded, in that order.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in IGNORED}
    frequencies = [
        (hashlib.sha256(rope.inv_freq.cpu().numpy().tobytes()).hexdigest(), rope.scaling)
        for rope in (layer.rope for layer in model.layers)
    ]
    return ModelIdentity(
        weights=_weights(model.module, folder),
        adapters=adapters,
        rope=_canonical({"layers": frequencies}),
        dtype=str(model.shape.dtype).removeprefix("torch."),
        num_layers=model.shape.num_layers,
        num_kv_heads=model.shape.num_kv_heads,
        head_dim=model.shape.head_dim,
        attention=_canonical({"config": config, "semantics": SEMANTICS} | _sharing(model)),
    )


def _sharing(model: HFModel) -> dict[str, Any]:
    """Which layer attends to whose KV, where not every one has its own."""
    if all(layer.owns for layer in model.layers):
        return {}
    return {"owners": [layer.owner for layer in model.layers]}


def _weights(module: PreTrainedModel, folder: Path | None) -> bytes:
    if folder is None:
        return state_digest(module.state_dict().items())
    files = weight_files(folder)
    try:
        return weights_digest(files, cache=cache_folder() / "weights.json")
    except OSError as error:
        log.warning("weights are hashed at every start: %s", error)
        return weights_digest(files, cache=None)


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, default=str)
