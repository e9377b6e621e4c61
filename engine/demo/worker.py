"""The other end of `demo.new_process`: a job from stdin, an outcome to stdout, as JSON."""

import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec
import torch

from engine.commands.session import quiet
from engine.demo.demo import Job
from engine.engine import Engine
from engine.errors import EngineError
from kvstore.errors import StoreError

J = TypeVar("J", bound=Job)


def work(kind: type[J], run: Callable[[Engine, J], msgspec.Struct]) -> int:
    """Run a job of this kind with the engine that it names; the exit status."""
    try:
        quiet()
        outcome = _run(msgspec.json.decode(sys.stdin.buffer.read(), type=kind), run)
    except (EngineError, StoreError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


def _run(job: J, run: Callable[[Engine, J], msgspec.Struct]) -> msgspec.Struct:
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    with Engine.from_pretrained(
        job.model, job.config, adapter=job.adapter, dtype=dtype, device=job.device
    ) as engine:
        return run(engine, job)
