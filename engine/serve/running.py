"""A server from its first part to its last."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from socket import socket

from engine.engine import Engine
from engine.serve.app import application
from engine.serve.desk import Desk
from engine.serve.server import Server
from engine.service.service import Service


@contextmanager
def serving(
    engine: Engine,
    name: str,
    make: Callable[[Engine], Service] = Service,
    at: socket | None = None,
) -> Iterator[Server]:
    """A server of an engine, which listens already and waits to be run. The engine stays open.

    Args:
        name: what clients call the model.
        make: the service of the engine, which is closed here.
        at: as in `Server`.
    Raises:
        ConfigError: a setting cannot be, or the address cannot be had.
    """
    service = make(engine)
    try:
        desk = Desk(engine, service, name)
        try:
            with closing(Server(application(desk), desk.config, desk.drain, at)) as server:
                yield server
        finally:
            service.close()
            desk.close()
    finally:
        service.close()
