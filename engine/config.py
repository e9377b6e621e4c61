"""What a user may set, from code or from a TOML file."""

import sys
import tomllib
from pathlib import Path
from typing import get_args

import msgspec
import torch

from engine.blend.repair import BlendConfig
from engine.errors import ConfigError
from engine.method import Method, preset
from engine.model.pieces import Shape
from engine.serve.config import ServeConfig
from engine.service.schedule import ScheduleConfig
from kvstore.codecs.known import exact_codec
from kvstore.config import StoreConfig
from kvstore.disk.packed import entry_cost
from kvstore.names import no_folder

LARGEST = {"block_tokens": 1 << 20}  # a block is read, written and verified as a whole


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of an engine.

    Args:
        prefill_chunk: prompt tokens computed at once; None takes 512, or 4,096 on a GPU, which
            needs larger products to be busy.
        block_tokens: tokens per stored block; a prompt's last, partial block is not stored.
        cache_bytes: budget of the keys and values of one call on the model's device. Its prompts
            that do not fit together run one group after the other. A sparse method counts here the
            hidden states of a prompt that is read, the layers in flight, layers that stay, and what
            the others have in the place of their KV: indexes, estimates, buffers, factors.
        method: how a long context is attended to in decode; see `engine.method`.
        pinned_bytes: budget of the KV of running requests in host memory, with a sparse method;
            page-locked where there is a GPU, and asked for when the engine starts.
        spill_path: folder for KV that finds no room there; None to keep all of it in memory.
        spill_bytes: budget of that folder.
        tenant: secret of whoever owns the stored KV. Another tenant never gets it, not even by
            asking the same question.
        store: where KV rests between requests; see `kvstore.config`.
        blend: how prompts of `Segments` reuse their chunks; see `engine.blend.repair`.
        schedule: how requests of a service run together; see `engine.service.schedule`.
        serve: of the HTTP server; see `engine.serve.config`.
    """

    prefill_chunk: int | None = None
    block_tokens: int = 64
    cache_bytes: int = 8 << 30
    method: Method = Method()
    pinned_bytes: int = 8 << 30
    spill_path: str | None = None
    spill_bytes: int = 64 << 30
    tenant: str = "default"
    store: StoreConfig = StoreConfig()
    blend: BlendConfig = BlendConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    serve: ServeConfig = ServeConfig()

    def __post_init__(self) -> None:
        for name in ("prefill_chunk", "block_tokens", "cache_bytes", "pinned_bytes", "spill_bytes"):
            value, most = getattr(self, name), LARGEST.get(name, sys.maxsize)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, got {value}")
        if self.spill_path is not None and no_folder(self.spill_path):
            raise ConfigError(
                f"spill_path must name a folder, got {self.spill_path!r}; leave it out for none"
            )

    def chunk(self, device: torch.device) -> int:
        """Prompt tokens computed at once on a device."""
        return self.prefill_chunk or (4096 if device.type == "cuda" else 512)

    def check(self, shape: Shape) -> None:
        """ConfigError for a tier that could not hold one block of a model of this shape."""
        size = (shape.num_layers, 2, shape.num_kv_heads, self.block_tokens, shape.head_dim)
        block = torch.empty(size, dtype=shape.dtype, device="meta")  # its size is all we need
        needs = [("store.host_bytes", self.store.host_bytes, block.nbytes)]
        if self.store.disk_path is not None:
            needed = entry_cost(block, exact_codec(self.store.codec))
            needs.append(("store.disk_bytes", self.store.disk_bytes, needed))
        largest = needs[-1][2]
        quotas = [self.store.tenant_quota_bytes, *self.store.tenant_quotas.values()]
        needs += [("store's tenant quota", quota, largest) for quota in quotas if quota is not None]
        for name, budget, needed in needs:
            if 0 < budget < needed:
                raise ConfigError(
                    f"{name} is {budget}, one block of {self.block_tokens} tokens of this model "
                    f"takes {needed} bytes: raise {name} or lower block_tokens"
                )

    @classmethod
    def from_toml(cls, path: str | Path) -> "EngineConfig":
        """Read a TOML file: top-level settings, and the tables `[store]`, `[method]`, `[blend]`,
        `[schedule]` and `[serve]`.

        A `preset` in `[method]` names what the table's other settings change.

        Raises:
            ConfigError: not readable, not TOML, an unknown key, a value of the wrong type.
        """
        try:
            settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            method = settings.get("method")
            if isinstance(method, dict) and "preset" in method:
                settings["method"] = msgspec.to_builtins(
                    preset(str(method.pop("preset")), **method)
                )
            return msgspec.convert(settings, cls)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: {error}; known settings: {_known(cls)}") from error


def _known(struct: type[msgspec.Struct], prefix: str = "") -> str:
    """Names of all settings, dotted."""
    names = []
    for field in msgspec.structs.fields(struct):
        kinds = (field.type, *get_args(field.type))  # it may be a table or None
        nested = [k for k in kinds if isinstance(k, type) and issubclass(k, msgspec.Struct)]
        dotted = prefix + field.name
        names.append(_known(nested[0], f"{dotted}.") if nested else dotted)
    return ", ".join(names)
