"""Names in settings, checked also where they come from code."""

from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import msgspec


def wrong_name(settings: msgspec.Struct) -> str | None:
    """What is wrong with the first that is no such name; msgspec checks only what it reads."""
    for name, known in _named(type(settings)).items():
        if (given := getattr(settings, name)) not in known:
            return f"{name} is one of {', '.join(known)}, got {given!r}"
    return None


def no_folder(path: str | Path) -> bool:
    """Whether no folder, and no file, can have this name."""
    return not str(path) or "\0" in str(path)


@cache
def _named(kind: type[msgspec.Struct]) -> dict[str, tuple[str, ...]]:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return {name: get_args(t) for name, t in fields.items() if get_origin(t) is Literal}
