"""The main job end to end: read a long text, stop, and answer from disk in a new process."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError
from kvstore.stats import StoreStats

T = TypeVar("T")


class DemoError(EngineError):
    """The demo did not show what it is there to show."""


class Job(msgspec.Struct, frozen=True):
    """What a process of the demo is to do."""

    model: str
    config: EngineConfig
    tokens: int
    facts: int
    seed: int
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """One question, and what came."""

    key: str
    value: str
    text: str
    right: bool
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    decode_s: float
    new_tokens: int


class Tier(msgspec.Struct, frozen=True):
    """What a tier did for a process so far."""

    used_bytes: int = 0
    hits: int = 0
    reads: int = 0


Tiers = dict[str, Tier]


def tiers_of(stats: StoreStats) -> Tiers:
    """Of the store's numbers, those that the demo shows."""
    return {
        name: Tier(tier.used_bytes, tier.hits, tier.reads) for name, tier in stats.tiers.items()
    }


class Outcome(msgspec.Struct, frozen=True):
    """What one process found; the store's numbers after its first and its last answer."""

    answers: list[Answer]
    after_first: Tiers
    after_last: Tiers

    @property
    def ttft_s(self) -> float:
        """Time to the first token of the process: of its first question."""
        return self.answers[0].ttft_s

    @property
    def correct(self) -> int:
        return sum(answer.right for answer in self.answers)


def run_process(job: Job, name: str) -> Outcome:
    """Do the job in a new Python process, which has ended when this returns. DemoError."""
    return new_process("engine.demo.process", job, name, Outcome)


def new_process(module: str, job: msgspec.Struct, name: str, kind: type[T]) -> T:
    """What a module makes of a job, both as JSON, in a new Python process.

    Raises:
        DemoError: it failed; the message is the last thing it said.
    """
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", module],
        input=msgspec.json.encode(job),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    if done.returncode < 0:
        raise DemoError(f"{name} was killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise DemoError(f"{name} failed: {said[-1]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=kind)


def check_cold(cold: Outcome) -> None:
    """DemoError if the store already had the text."""
    if cold.answers[0].cached_tokens:
        raise DemoError("the store already has this text: use another --store or --seed")


def check_warm(warm: Outcome, block_tokens: int) -> None:
    """DemoError unless the first question of a new process was answered from the disk tier."""
    first, disk = warm.answers[0], warm.after_first["disk"]
    blocks = first.cached_tokens // block_tokens
    others = sum(tier.reads for name, tier in warm.after_first.items() if name != "disk")
    if not blocks or disk.hits < blocks or disk.reads < blocks or others:
        raise DemoError(
            f"the new process took {first.cached_tokens} tokens from the store, with {disk.hits} "
            f"disk hits and {others} reads elsewhere: that was not the disk tier"
        )


def decode_tokens_per_s(*outcomes: Outcome) -> float:
    """Tokens after the first of every answer, by the time they took."""
    answers = [answer for outcome in outcomes for answer in outcome.answers]
    spent = sum(answer.decode_s for answer in answers)
    return sum(answer.new_tokens - 1 for answer in answers) / spent if spent else 0.0
