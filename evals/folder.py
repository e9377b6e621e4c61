"""The folder of a run: how it was made, and that what is added to it is made alike."""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from engine.engine import Engine
from engine.errors import ConfigError
from engine.model.loader import locate
from evals.facts import commit, digest_files, hardware, versions
from evals.record import Journal
from evals.registry import data_digests, parse, text_digest
from evals.ruler.essay import default_text
from evals.settings import RunSettings

RUN = "run.json"
WORDS = ("wonderwords",)  # packages that samples' words are of
MAY_COME = ("data ", "words of ")  # what a run may start without, and find later
HAYSTACK = "data haystack"
WHY = {HAYSTACK: " (its text is another; the default one is Python's, of each release its own)"}
TOKENIZER = ("tokenizer*", "*.model", "chat_template*", "vocab*", "merges.txt", "special_tokens*")


def facts(engine: Engine, settings: RunSettings, haystack: str | None = None) -> dict[str, Any]:
    """How a run is made: what its results depend on, and where it runs.

    Args:
        haystack: see `evals.registry.haystack_text`; read here where it was not.
    """
    suites = [parse(name).suite for name in settings.suite]
    return {
        "model": settings.model,
        "settings": settings.identity,
        "weights": engine.identity.digest.hex(),
        "tokenizer": tokenizer_digest(locate(settings.model)),
        "data": data_digests(suites, settings, haystack),
        "dtype": str(engine.model.shape.dtype).removeprefix("torch."),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(engine.model.shape.device),
        "starts": [],
    }


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of the files that make tokens of texts, the chat template's included."""
    files = {file for pattern in TOKENIZER for file in folder.glob(pattern)}
    return digest_files(folder, sorted(files))


def open_folder(path: str | Path, made: dict[str, Any]) -> Journal:
    """The records of a run, new or to be gone on with; notes in `run.json` that it started.

    Args:
        made: see `facts`.
    Raises:
        ConfigError: the folder is of another run; says what differs.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    try:
        found = _read(folder / RUN) or made
        _refuse_other(folder, found, made)
        if not (folder / RUN).exists() and journal.records:
            raise ConfigError(f"{folder} has records, but no {RUN} that says how they were made")
        grown = {"data": found["data"] | made["data"]}  # data that was missing may be there now
        _write(folder / RUN, found | grown | {"starts": [*found["starts"], _start(made)]})
    except BaseException:
        journal.close()
        raise
    return journal


class _Made(msgspec.Struct):
    """What a run's file has at least."""

    settings: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    weights: str
    tokenizer: str
    dtype: str
    starts: list[Any]


def _start(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["headrace-eval", *sys.argv[1:]]),
        "commit": made["commit"],
        "versions": made["versions"],
        "hardware": made["hardware"],
    }


def _refuse_other(folder: Path, found: dict[str, Any], made: dict[str, Any]) -> None:
    before, now = _flat(found), _flat(made)
    if HAYSTACK in now:  # runs from before it was noted had the default one
        before.setdefault(HAYSTACK, _json(text_digest(default_text())))
    one_has_it = before.keys() ^ now.keys()
    differ = [
        f"{name} is {now.get(name)}, was {before.get(name)}{WHY.get(name, '')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not (name in one_has_it and name.startswith(MAY_COME))
    ]
    if differ:
        raise ConfigError(
            f"{folder} is of a run with other settings: {'; '.join(differ)}. Name another folder"
        )


def _flat(made: dict[str, Any]) -> dict[str, str]:
    """What must be the same, by name, as JSON."""
    flat = dict(made["settings"]) | {f"data {k}": v for k, v in made["data"].items()}
    flat |= {name: made[name] for name in ("weights", "tokenizer", "dtype")}
    flat |= {f"words of {k}": v for k, v in made["versions"].items() if k in WORDS}
    return {name: _json(value) for name, value in flat.items()}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        msgspec.convert(found, _Made)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} does not say how the run was made: {error}") from error
    return found


def _write(path: Path, made: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
    part.replace(path)
