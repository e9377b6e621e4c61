"""`headrace serve`: a model behind OpenAI's interface."""

import importlib.util
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from engine.commands.session import engine_config, open_engine
from engine.config import EngineConfig
from engine.errors import ConfigError
from kvstore.errors import StoreError
from native.heap import few_arenas

PACKAGES = ("uvicorn", "starlette", "prometheus_client")


def run(args: Namespace) -> int:
    config = _config(args)
    if None in map(importlib.util.find_spec, PACKAGES):
        raise ConfigError("a server needs more packages: pip install 'headrace[serve]'")
    bound_caches()
    few_arenas()
    from engine.serve.running import serving
    from engine.serve.server import bound

    with (
        bound(config.serve) as address,  # before a model is loaded for nothing
        open_engine(args, config) as engine,
    ):
        name = Path(args.model).resolve().name
        with _access_log(config), serving(engine, name, at=address) as server:
            server.run(lambda url: print(f"ready {url}", file=sys.stderr, flush=True))
        with suppress(StoreError):  # the log has had it since it happened
            engine.store.flush()
    return 0


def bound_caches() -> None:
    """Keep memory from growing with the number of shapes that a server has computed.

    oneDNN and torch each keep what oneDNN compiled for the last 1,024 shapes of matrix products:
    most of a megabyte each. They read this before the first of them.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


def _config(args: Namespace) -> EngineConfig:
    config = engine_config(args)
    changes: dict[str, Any] = {"host": args.host, "port": args.port}
    given = {name: value for name, value in changes.items() if value is not None}
    return msgspec.structs.replace(config, serve=msgspec.structs.replace(config.serve, **given))


@contextmanager
def _access_log(config: EngineConfig) -> Iterator[None]:
    """Requests are logged where the configuration says."""
    from engine.serve.access_log import AccessLog

    if config.serve.access_log is None:
        yield
        return
    handler, logger = AccessLog(config.serve.access_log), logging.getLogger("headrace.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
