"""Bytes of a body as a struct, or a refusal that says which field is wrong, and how."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from engine.serve.refusals import Refusal, invalid, shown, unsupported

T = TypeVar("T")

MALFORMED = "We could not parse the JSON body of your request"
SMALL = 1 << 16  # bytes of a body that is read twice; a megabyte of numbers would take a second
WORDS = {"int": "integer", "float": "number", "str": "string", "bool": "boolean"}  # JSON's

_AT = re.compile(r" - at `\$\.?(?P<path>[^`]*)`\Z")
_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`\Z")
_QUOTED = re.compile(r"`([^`]*)`")


def read(body: bytes, shape: type[T], only: Mapping[str, str]) -> T:
    """The request that a body holds.

    Args:
        only: by the name of a field that has no effect here, the one value that may be sent.
    Raises:
        Refusal: anything else.
    """
    try:
        try:
            return msgspec.json.decode(body, type=shape)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error) or len(body) > SMALL:
                raise
            return msgspec.convert(_whole(msgspec.json.decode(body)), shape)
    except msgspec.ValidationError as error:
        raise _refused(str(error), only) from None
    except msgspec.DecodeError as error:
        raise invalid(f"{MALFORMED}: {error}") from None
    except UnicodeDecodeError:
        raise invalid(f"{MALFORMED}: it is not UTF-8") from None
    except RecursionError:
        raise invalid(f"{MALFORMED}: it is nested too deeply") from None


def _refused(said: str, only: Mapping[str, str]) -> Refusal:
    """What msgspec said, as OpenAI would."""
    at = _AT.search(said)
    path, what = (at["path"].replace("[...]", ""), said[: at.start()]) if at else ("", said)
    if unknown := _FIELD.match(what):
        return _unknown(unknown["name"], path)
    if missing := _MISSING.match(what):
        name = _joined(path, missing["name"])
        return invalid(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if not path:
        return invalid(f"The body of the request must be a JSON object: {_worded(what)}.")
    if (accepted := only.get(re.sub(r"\[.*?\]", "", path))) is not None:
        return unsupported(path, accepted)
    code = "invalid_type" if ", got " in what else "invalid_value"
    return invalid(f"Invalid value for '{path}': {_worded(what)}.", path, code)


def _whole(value: Any) -> Any:
    """With whole numbers as such: in JSON 5.0 is 5, in Python it is not."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [_whole(part) for part in value]
        case dict():
            return {name: _whole(part) for name, part in value.items()}
    return value


def _unknown(name: str, path: str) -> Refusal:
    if path:
        whole = shown(_joined(path, name))
        return invalid(f"Unknown parameter: {whole}.", whole[1:-1], "unknown_parameter")
    return invalid(f"Unrecognized request argument supplied: {shown(name)[1:-1]}")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _worded(what: str) -> str:
    """Types in JSON's words, and no more of the client's than need be."""
    plain = _QUOTED.sub(lambda m: " or ".join(WORDS.get(t, t) for t in m[1].split(" | ")), what)
    return shown(plain[:1].lower() + plain[1:])[1:-1]
