"""LongBench's rows: from files, saved data sets, mappings of rows, or the hub."""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from engine.errors import ConfigError
from evals.longbench.tasks import TASKS
from evals.rows import read_rows

Folder: TypeAlias = str | Path | Mapping[str, Iterable[Mapping[str, Any]]]
T = TypeVar("T", bound=msgspec.Struct)
HUB, ARCHIVE = "THUDM/LongBench", "data.zip"


class Row(msgspec.Struct, frozen=True):
    """A row of a data set, of which more columns are known than are needed here."""

    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None = None


def tasks_in(folder: Folder | None) -> tuple[str, ...]:
    """The data sets that there are rows of; all, on the hub. ConfigError where there are none."""
    if folder is None:
        return tuple(TASKS)
    if isinstance(folder, Mapping):
        found = tuple(task for task in TASKS if task in folder)
    else:
        found = tuple(task for task in TASKS if _path(folder, task).exists())
    if not found:
        raise ConfigError(
            f"{'this mapping' if isinstance(folder, Mapping) else folder} has no rows of LongBench:"
            " there must be files like hotpotqa.jsonl, or folders like hotpotqa that the package "
            "datasets saved"
        )
    return found


def rows_of(folder: Folder | None, task: str) -> Iterator[Row]:
    """The rows of a data set, in their order.

    Raises:
        ConfigError: there are none, or one is of another form.
    """
    if folder is None:
        found: Iterable[Mapping[str, Any]] = _from_hub(task)
    elif isinstance(folder, Mapping):
        found = folder[task]
    else:
        found = read_rows(_path(folder, task))
    return checked(found, Row, task)


def checked(rows: Iterable[Mapping[str, Any]], kind: type[T], name: str) -> Iterator[T]:
    """Rows as structs. ConfigError where a column is missing or of another type."""
    for number, row in enumerate(rows, 1):
        try:
            yield msgspec.convert(row, kind)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{name}, row {number}, is none of LongBench: {error}") from error


def _path(folder: str | Path, task: str) -> Path:
    """The file of a data set, else the folder that `datasets` saved it to."""
    file = Path(folder) / f"{task}.jsonl"
    return file if file.exists() else Path(folder) / task


def _from_hub(task: str) -> list[dict[str, Any]]:
    """Out of the archive that the data sets are published in; the hub's cache keeps it."""
    from huggingface_hub import hf_hub_download  # the network's client is slow to import

    try:
        path = hf_hub_download(HUB, ARCHIVE, repo_type="dataset")
    except OSError as error:  # as are all errors of the hub's client
        raise ConfigError(
            f"cannot fetch {ARCHIVE} of {HUB} from the hub; unpack it where there is a network, "
            f"and name its folder with --longbench: {error}"
        ) from error
    with zipfile.ZipFile(path) as archive:
        lines = archive.read(f"data/{task}.jsonl").split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]
