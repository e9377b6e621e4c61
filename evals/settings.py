"""What a run is asked to do: from the command line, a TOML file, or code."""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import ConfigError
from kvstore.names import no_folder

DATA = ("haystack", "squad", "hotpotqa", "musique", "longbench", "longbench_v2")
LONGEST = 1 << 24  # tokens of a prompt: more than any model takes, and its text still fits memory


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a run. In a TOML file they have the same names.

    Args:
        model: folder or hub id.
        suite: names of suites, see `evals.registry`; "fidelity:NAME" and "speed:NAME" measure on
            the samples of the suite NAME, "fidelity" and "speed" on those of needle.
        method: presets of `engine.method`; dense runs in any case.
        budget: of every method but dense: tokens, or shares of the prompt's below 1.
        lengths: tokens of prompts with their answers; in a file also like "4k", which is 4096.
        tasks: of the suites; empty for all.
        limit: samples of each task and length.
        seed: of suites that make their samples.
        per_head: fidelity notes measures of every layer and KV head, too.
        settings: of methods, by name, e.g. {"shadowkv": {"rank": 48}}; see `engine.method.Method`.
        haystack: text file that needles are hidden in; None for Python's reference pages.
        squad, hotpotqa, musique, longbench, longbench_v2: data, see the suites.
        dtype, device, cache_bytes, pinned_bytes: of the engine, see `engine.config`.
    """

    model: str = "needle-tiny"
    suite: tuple[str, ...] = ()
    method: tuple[str, ...] = ("dense", "headrace")
    budget: tuple[float, ...] = (0.016,)
    lengths: tuple[int, ...] = (4096,)
    tasks: tuple[str, ...] = ()
    limit: int = 20
    seed: int = 42
    per_head: bool = False
    settings: dict[str, dict[str, Any]] = {}
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    musique: str | None = None
    longbench: str | None = None
    longbench_v2: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    cache_bytes: int = 8 << 30
    pinned_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        for name in ("suite", "method", "lengths"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing: name one or more")
        for name in ("limit", "cache_bytes", "pinned_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in DATA:
            if (path := getattr(self, name)) is not None and no_folder(path):
                raise ConfigError(f"{name} must name a file, a folder or a hub id, got {path!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on, but for the model and the data, whose names do not matter."""
        other = {"model", "cache_bytes", "pinned_bytes", *DATA}
        found = {k: v for k, v in msgspec.to_builtins(self).items() if k not in other}
        if not self.per_head:
            del found["per_head"]  # runs from before there was such a setting go on
        return found


def tokens(length: Any) -> int:
    """A number of tokens up to `LONGEST`; "4k" is 4096. ConfigError for anything else."""
    found = re.fullmatch(r"(\d+)(k?)", str(length).strip().lower())
    number = int(found[1]) * (1024 if found[2] else 1) if found else 0
    if not 1 <= number <= LONGEST:
        raise ConfigError(f"lengths are tokens, like 4096 or 4k, up to {LONGEST:,}; got {length}")
    return number


def read_settings(path: str | None, given: dict[str, Any]) -> RunSettings:
    """The settings of a TOML file, with those that are `given` in their place.

    Raises:
        ConfigError: not readable, not TOML, an unknown key, a value of the wrong type.
    """
    found = ({} if path is None else _toml(path)) | given
    if isinstance(lengths := found.get("lengths"), list):
        found["lengths"] = [tokens(length) for length in lengths]
    try:
        return msgspec.convert(found, RunSettings)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from error
        known = ", ".join(RunSettings.__struct_fields__)
        raise ConfigError(f"{path or 'settings'}: {error}; known settings: {known}") from error


def _toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
