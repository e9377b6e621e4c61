"""The loops: prefill, decode, and the engine that drives them."""

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, EngineError, ModelError, PromptError
from engine.request import Completion, Event, RequestStats
from engine.sampling import Sampling

__all__ = [
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
]
