"""Traces from files: which blocks every request's prompt is made of."""

import gzip
import heapq
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError

ENDINGS = (".jsonl", ".jsonl.gz")
Ids: TypeAlias = NDArray[np.int64]
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
LONGEST = 1 << 24  # blocks of a prompt: more than any model reads
USERS = 32  # with a session each, at any time, where sessions have no start of their own


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Prompts as chains of blocks, in the order in which they came.

    Args:
        chains: ids of blocks, 0 to `distinct` - 1, from the head of the prompt on. An id stands for
            all tokens up to its block's end, so it has the same blocks before it wherever it
            comes. The last block of a prompt counts even where it is not full.
    """

    name: str
    chains: list[NDArray[np.int32]]
    distinct: int

    @property
    def blocks(self) -> int:
        """Of all prompts together."""
        return sum(map(len, self.chains))

    @property
    def shared(self) -> int:
        """How many leading blocks all prompts have in common."""
        common = self.chains[0]
        for chain in self.chains:
            size = min(len(common), len(chain))
            differ = np.flatnonzero(common[:size] != chain[:size])
            common = common[: differ[0] if len(differ) else size]
        return len(common)


class _Conversation(msgspec.Struct):
    """A line of Mooncake's format (FAST 2025): ids of prefix blocks."""

    hash_ids: list[int]


class _Turn(msgspec.Struct):
    """A line of the agentic format: `k` blocks shared with request `p` of its session, of `n`."""

    s: int
    i: int
    t: float
    n: int
    p: int
    k: int


def read_traces(path: Path, limit: int | None = None) -> list[RequestTrace]:
    """Every trace in a folder, or the one in a file.

    Args:
        path: of `.jsonl` or `.jsonl.gz`, in Mooncake's format (`hash_ids`) or the agentic one (`s`,
            `i`, `t`, `n`, `p`, `k`), told apart by their first line.
        limit: the first so many requests of each.
    Raises:
        ConfigError: there is none, or one is in no known format.
    """
    files = (
        sorted(x for x in path.iterdir() if x.name.endswith(ENDINGS)) if path.is_dir() else [path]
    )
    if not files or not files[0].exists():
        raise ConfigError(f"no traces in {path}: needs files that end in {' or '.join(ENDINGS)}")
    return [_read(file, limit) for file in files]


def _read(path: Path, limit: int | None) -> RequestTrace:
    raw = path.read_bytes()
    try:
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        lines = [line for line in text.splitlines() if line.strip()]
        first: Any = msgspec.json.decode(lines[0]) if lines else {}
        if isinstance(first, dict) and "hash_ids" in first:
            talks = _decoded(lines[:limit], _Conversation)
            chains = [np.array(talk.hash_ids, np.int64) for talk in talks]
        else:
            chains = _sessions(_decoded(lines, _Turn), limit)
    except (*UNREADABLE, gzip.BadGzipFile, zlib.error, EOFError, OverflowError) as error:
        raise ConfigError(
            f"{path} is no trace: needs lines with hash_ids, or with s, i, t, n, p, and k: {error}"
        ) from error
    return trace(path.name.removesuffix(".gz").removesuffix(".jsonl"), chains)


def _decoded(lines: Iterable[bytes], kind: type[Any]) -> list[Any]:
    decoder = msgspec.json.Decoder(kind)
    return [decoder.decode(line) for line in lines]


def trace(name: str, chains: Sequence[Ids | list[int]]) -> RequestTrace:
    """A trace of chains with any ids.

    Raises:
        ConfigError: no chain, an empty one, or an id with different blocks before it.
    """
    if not chains or not all(map(len, chains)):
        raise ConfigError(f"trace {name}: needs requests with at least one block each")
    lengths = [len(chain) for chain in chains]
    names, ids = np.unique(np.concatenate(chains), return_inverse=True)
    starts = np.cumsum([0, *lengths[:-1]])
    before = np.roll(ids, 1)
    before[starts] = -1
    parent = np.empty(len(names), ids.dtype)
    parent[ids] = before
    if (wrong := np.flatnonzero(parent[ids] != before)).size:
        raise ConfigError(
            f"trace {name}: block {names[ids[wrong[0]]]} follows different blocks; "
            "an id must stand for the whole prefix up to its block"
        )
    return RequestTrace(name, np.split(ids.astype(np.int32), starts[1:]), len(names))


def _sessions(lines: list[_Turn], limit: int | None) -> list[Ids]:
    """Chains of all sessions, merged by time.

    The file knows no time but that since a session's first request. Here `USERS` have a session
    each at any time, and begin the next one of the file when theirs ends.
    """
    starts = _starts(lines)
    chains = list(_built(lines))
    order = sorted(range(len(lines)), key=lambda x: starts[lines[x].s] + lines[x].t)
    return [chains[x] for x in order[:limit]]


def _starts(lines: list[_Turn]) -> dict[int, float]:
    lasts: dict[int, float] = {}
    for x in lines:
        lasts[x.s] = max(x.t, lasts.get(x.s, 0.0))
    free = [0.0] * USERS
    return {session: heapq.heapreplace(free, free[0] + last) for session, last in lasts.items()}


def _built(lines: list[_Turn]) -> Iterator[Ids]:
    """Chains in the order of the lines: a beginning of an earlier one, and fresh blocks."""
    made: dict[tuple[int, int], Ids] = {}
    fresh, nothing = 0, np.empty(0, np.int64)
    for x in lines:
        earlier = made.get((x.s, x.p), nothing)
        if x.n > LONGEST:
            raise ConfigError(
                f"request {x.i} of session {x.s} has {x.n:,} blocks; at most {LONGEST:,} are read"
            )
        if not 0 <= x.k <= min(x.n, len(earlier)):
            raise ConfigError(
                f"request {x.i} of session {x.s} has {x.n} blocks and shares {x.k} with request "
                f"{x.p}, which has {len(earlier)} so far"
            )
        stop = fresh + x.n - x.k
        made[x.s, x.i] = np.concatenate([earlier[: x.k], np.arange(fresh, stop)])
        fresh = stop
        yield made[x.s, x.i]
