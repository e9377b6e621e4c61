"""What a run found out: a line of JSON for every question, method and budget.

A run's folder holds `records.jsonl`, which is appended to and never rewritten: it is the result,
and says what need not be run again. `run.json` beside it says how it was made.
"""

import fcntl
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from engine.errors import ConfigError, EngineError
from evals.task import Sample

RECORDS = "records.jsonl"
NO_CONTEXT = "no context"  # the method of the floor: dense, asked without the context
Key: TypeAlias = "tuple[str, str, int, str, float | None]"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one sample, by one method at one budget: an answer, measures, or an error.

    Args:
        id, task, family, length, extra: the sample's.
        suite: the sample's; "fidelity" or "speed" where the record is a measurement on it.
        turn: number of the question.
        method: name of a preset of `engine.method`, or `NO_CONTEXT`.
        budget: share of the prompt's tokens (below 1) or tokens; None for dense and the floor.
        prompt_sha256: of the token ids as little-endian int32; equal where prompts are.
        prediction: as the model said it, without prefix, stop text and special tokens.
        score: 0..100; None where there is none, as for an error.
        prefill_s: reading the context, which all methods of a sample share.
        ttft_s: from nothing to the first token: prefill, index, and the question's tokens.
        decode_tok_s: answer tokens a second of this turn (turns are decoded as a batch).
        bytes_moved: of K and V that a step reads where they rest: fetched to the device, or
            attended to in place; mean over steps, layers that select summed.
        peak_mem: bytes; of the device's allocator on a GPU, of the process else.
        kept_tokens: that a KV head attends to, mean over steps and layers that select.
        index_bytes: per token of the context and KV head, layers that select averaged.
        measures: of fidelity and speed, by name; finite.
        error: one line, where the turn could not be asked.
    """

    id: str
    suite: str
    task: str
    family: str
    length: int
    turn: int
    method: str
    budget: float | None
    prompt_sha256: str = ""
    prompt_tokens: int = 0
    prediction: str = ""
    outputs: tuple[str, ...] = ()
    score: float | None = None
    prefill_s: float | None = None
    ttft_s: float | None = None
    decode_tok_s: float | None = None
    bytes_moved: float | None = None
    peak_mem: int | None = None
    kept_tokens: float | None = None
    index_bytes: float | None = None
    extra: dict[str, Any] = {}
    measures: dict[str, float] = {}
    error: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.measures.items():
            if not math.isfinite(value):  # JSON has no word for it
                raise EngineError(f"{self.method}: the measure {name} is {value}")

    @classmethod
    def of(
        cls, sample: Sample, turn: int, method: str, budget: float | None, **found: Any
    ) -> "Record":
        """A record of a sample's turn, with what was found; `suite` replaces the sample's."""
        known: dict[str, Any] = {
            "id": sample.id,
            "suite": sample.suite,
            "task": sample.task,
            "family": sample.family,
            "length": sample.length,
            "outputs": sample.turns[turn].outputs,
            "extra": sample.extra,
        }
        return cls(turn=turn, method=method, budget=budget, **(known | found))

    @property
    def key(self) -> Key:
        """What makes it this record and no other: of several, the last one counts."""
        return self.suite, self.id, self.turn, self.method, self.budget


def read_records(folder: str | Path) -> list[Record]:
    """All records of a run, whether it has ended or not.

    A last line without its end, which a killed process leaves, is no record.

    Raises:
        ConfigError: there is no such file, or a line of it is no record.
    """
    path = Path(folder) / RECORDS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"no records of a run in {folder}: {error.strerror}") from error
    return list(_decoded(path, lines))


def _decoded(path: Path, lines: list[bytes]) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(Record)
    for number, line in enumerate(lines, 1):
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}, is no record: {error}") from error


class Journal:
    """The records of a run, open for more. What was added is in the file when `add` returns.

    Args:
        folder: of the run; a torn last line of its records is cut off.
    Raises:
        ConfigError: a line is no record, or another process writes here.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / RECORDS
        self._latest: dict[Key, Record] = {}
        self._failed: set[Key] = set()
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._note(read_records(folder))
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{folder} is being written by another run: wait for it") from None
        except BaseException:
            self._file.close()
            raise

    @property
    def records(self) -> list[Record]:
        """One of each key: where there are several, the last one."""
        return list(self._latest.values())

    @property
    def failures(self) -> int:
        """How many errors there are."""
        return len(self._failed)

    def has(self, key: Key) -> bool:
        """Whether there is such a record, and no error: what failed may be tried again."""
        return key in self._latest and key not in self._failed

    def add(self, records: Iterable[Record]) -> None:
        """Append those that it has not, at once; of a failure that failed again there is one."""
        new = [x for x in records if not self.has(x.key) and self._latest.get(x.key) != x]
        self._file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in new))
        self._file.flush()
        self._note(new)

    def failed(self, key: Key) -> bool:
        """Whether there is an error under this key."""
        return key in self._failed

    def _note(self, records: Iterable[Record]) -> None:
        for record in records:
            self._latest[record.key] = record
            (self._failed.discard if record.error is None else self._failed.add)(record.key)

    def close(self) -> None:
        """Give the file back; idempotent."""
        self._file.close()
