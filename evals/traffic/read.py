"""Arrivals from files."""

import csv
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from engine.errors import ConfigError
from evals.traffic.arrival import Arrival

Row: TypeAlias = dict[str, str]

AZURE = frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"})
BURSTGPT = frozenset({"Timestamp", "Request tokens", "Response tokens"})
SESSION = "Session ID"  # newer BurstGPT files have it, older ones lack it


def read_arrivals(path: Path) -> list[Arrival]:
    """Requests of a CSV file, by time, the first at 0.

    Args:
        path: in the format of Azure's LLM inference traces (Patel et al. 2024, Splitwise) or of
            BurstGPT (Wang et al. 2024), with or without sessions; told apart by the first line.
    Raises:
        ConfigError: cannot be read, is in neither format, or has no requests.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = list(_parsed(csv.DictReader(file)))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise ConfigError(f"{path} is no trace of requests: {error}") from error
    if not found:
        raise ConfigError(f"{path} has no requests")
    found.sort(key=lambda x: x.at_s)
    return [_from(found[0].at_s, x) for x in found]


def _from(first_s: float, x: Arrival) -> Arrival:
    return Arrival(x.at_s - first_s, x.prompt_tokens, x.new_tokens, x.session, x.failed)


def _parsed(rows: "csv.DictReader[str]") -> Iterator[Arrival]:
    """ValueError where the columns are not those of a format, or a row is wrong."""
    read = _format(frozenset(rows.fieldnames or ()))
    for row in rows:
        try:
            arrival = read(row)
            if arrival.prompt_tokens < 0 or arrival.new_tokens < 0:
                raise ValueError("tokens below 0")
            if not math.isfinite(arrival.at_s):
                raise ValueError(f"the time {arrival.at_s}")
        except (ValueError, TypeError) as error:  # TypeError: a row that is too short has None
            raise ValueError(f"line {rows.line_num}: {error}") from error
        yield arrival


def _format(columns: frozenset[str]) -> Callable[[Row], Arrival]:
    for needed, read in ((AZURE, _azure), (BURSTGPT, _burstgpt)):
        if needed <= columns:
            return read
    raise ValueError(
        f"needs the columns {', '.join(sorted(AZURE))} or {', '.join(sorted(BURSTGPT))}, "
        f"has {', '.join(sorted(columns)) or 'none'}"
    )


def _azure(row: Row) -> Arrival:
    at_s = datetime.fromisoformat(row["TIMESTAMP"] + "+00:00").timestamp()
    return Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(row: Row) -> Arrival:
    answer = int(row["Response tokens"])
    return Arrival(
        at_s=float(row["Timestamp"]),
        prompt_tokens=int(row["Request tokens"]),
        new_tokens=answer,
        session=row.get(SESSION) or None,
        failed=answer == 0,  # as their README says
    )
