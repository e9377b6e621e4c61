"""Reads the counters of an engine and the service that runs it."""

from engine.engine import Engine
from engine.serve.counters import Read, Readings, pool_reading
from engine.serve.owners import Names
from engine.service.service import Service


def read_of(engine: Engine, service: Service, tenants: Names) -> Read:
    """Reads them all, whenever it is called."""

    def read() -> Readings:
        pool = engine.memory.pool
        return Readings(
            service=service.stats(),
            pool=None if pool is None else pool_reading(pool),
            store=engine.stats(),
            tenants=tenants,
        )

    return read
