"""Rows of a data set: from a file, a saved data set, the hub, or as they are given."""

import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from engine.errors import ConfigError

Row: TypeAlias = Any  # a JSON object, if all is well
Source: TypeAlias = str | Path | Iterable[Row]
SPLITS = ("validation", "dev", "test", "train")  # the first there is is taken


def read_rows(source: Source) -> list[Row]:
    """All rows.

    Args:
        source: a .json or .jsonl file; a folder with one such file in it (`*_corpus.json` does not
            count), or with what `datasets` saved to it; the name of a data set on the hub, as
            NAME or NAME:CONFIG; or rows, such as `datasets.load_dataset("json", ...)` gives.
    Raises:
        ConfigError: there is nothing of that kind.
    """
    if not isinstance(source, str | Path):
        return list(source)
    path = Path(source)
    if path.is_dir():
        return _saved(path) if _is_saved(path) else _file(_only_file(path))
    if path.is_file():
        return _file(path)
    if isinstance(source, Path) or path.suffix in (".json", ".jsonl") or source[:1] in "./~":
        raise ConfigError(f"there is no {source}: name a file, a folder, or a data set of the hub")
    return _hub(source)


def default_source(folder: str, setting: str) -> Path:
    """`$HEADRACE_DATA/folder`.

    Args:
        setting: that would name another one.
    Raises:
        ConfigError: the variable is not set.
    """
    data = os.environ.get("HEADRACE_DATA")
    if not data:
        raise ConfigError(
            f"this task needs a data set: name it with {setting}, or set HEADRACE_DATA"
        )
    return Path(data) / folder


def _file(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return found if isinstance(found, list) else [found]


def _only_file(folder: Path) -> Path:
    files = [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    found = sorted(x for x in files if not x.stem.endswith("_corpus"))
    if len(found) != 1:
        names = ", ".join(x.name for x in found) or "none"
        raise ConfigError(f"{folder} must have one .json or .jsonl file, it has {names}: name one")
    return found[0]


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: Path) -> list[Row]:
    package = _datasets()
    try:
        found = package.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{folder} cannot be read as a saved data set: {type(error).__name__}: {error}"
        ) from error
    return _split(found, str(folder))


def _hub(name: str) -> list[Row]:
    path, _, config = name.partition(":")
    package = _datasets()
    try:
        found = package.load_dataset(path, config or None)
    except (OSError, ValueError) as error:  # what datasets and the hub's client raise
        raise ConfigError(f"no data set {name}: {error}") from error
    return _split(found, name)


def _split(found: Any, name: str) -> list[Row]:
    if not isinstance(found, dict):
        return list(found)
    split = next((x for x in SPLITS if x in found), None)
    if split is None:
        raise ConfigError(f"{name} has none of the splits {', '.join(SPLITS)}")
    return list(found[split])


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(
            "this is read through the package datasets, which is missing: "
            "pip install 'headrace[evals]'"
        ) from None
