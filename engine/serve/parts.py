"""Reads the counters of an engine and the service that runs it."""

import msgspec

from engine.engine import Engine
from engine.serve.counters import Read, Readings, pool_reading
from engine.serve.owners import Names
from engine.serve.report import Running, Swap
from engine.service.service import Service


def read_of(engine: Engine, service: Service, tenants: Names) -> Read:
    """Reads them all, whenever it is called."""

    def read() -> Readings:
        now, pool = service.stats(), engine.memory.pool
        return Readings(
            waiting=now.waiting,
            running=now.running,
            swapped=now.swapped,
            steps=now.steps,
            preemptions=now.preemptions,
            completed=now.completed,
            cancelled=now.cancelled,
            failed=now.failed,
            background=now.chores,
            prompt_tokens=now.prompt_tokens,
            new_tokens=now.new_tokens,
            kv=msgspec.convert(now, Running, from_attributes=True),
            swap=msgspec.convert(now.swap, Swap, from_attributes=True),
            pool=None if pool is None else pool_reading(pool),
            store=engine.stats(),
            tenants=tenants,
        )

    return read
