"""The loops: prefill, decode, and the engine that drives them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.blend.repair import BlendConfig, BlendReport
    from engine.blend.segments import Segments
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.errors import ConfigError, EngineError, ModelError, PromptError
    from engine.request import Completion, Event, RequestStats
    from engine.sampling import Sampling

__all__ = [
    "BlendConfig",
    "BlendReport",
    "Completion",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Event",
    "ModelError",
    "PromptError",
    "RequestStats",
    "Sampling",
    "Segments",
]

# Imported when first asked for: torch and transformers take seconds, `headrace --help` must not.
_HOMES = {
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine",),
    "engine.errors": ("ConfigError", "EngineError", "ModelError", "PromptError"),
    "engine.blend.repair": ("BlendConfig", "BlendReport"),
    "engine.request": ("Completion", "Event", "RequestStats"),
    "engine.sampling": ("Sampling",),
    "engine.blend.segments": ("Segments",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
