"""What the commands share: settings from options, an engine, files, and two consoles."""

import json
import logging
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.status import Status
from rich.text import Text

from engine.config import EngineConfig
from engine.errors import ConfigError, PromptError
from engine.method import Method, preset
from kvstore.config import StoreConfig
from kvstore.remote.config import RemoteConfig
from native.folders import cache_folder

if TYPE_CHECKING:  # importing these takes seconds, and not every command needs them
    from engine.engine import Engine
    from engine.request import Completion, Event


def progress() -> Console:
    """Where everything goes that is not the result."""
    return Console(stderr=True, highlight=False, markup=False)


def busy(what: str) -> Status:
    """Says there what takes long, meanwhile. Brackets, as in names of files, are no markup."""
    return progress().status(Text(what))


def default_store() -> Path:
    """Where the command line keeps KV: `$XDG_CACHE_HOME/headrace/store`."""
    return cache_folder() / "store"


def engine_config(args: Namespace) -> EngineConfig:
    """Settings of `--config`, changed by the options for the store and the method."""
    config = EngineConfig() if args.config is None else EngineConfig.from_toml(args.config)
    changes: dict[str, Any] = {"disk_path": _disk_path(args, config)}
    if changes["disk_path"] is None and not config.store.host_bytes:
        changes["host_bytes"] = StoreConfig().host_bytes  # some tier must be left
    try:
        if (url := getattr(args, "remote", None)) is not None:
            changes["remote"] = _remote(url, config.store.remote)
        store = msgspec.structs.replace(config.store, **changes)
        if store.remote is not None:
            store.remote.secret()  # complains before a model is loaded
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return msgspec.structs.replace(config, store=store, method=_method(args, config))


def _method(args: Namespace, config: EngineConfig) -> Method:
    """The method of `--method`, or of the configuration, with `--budget`."""
    name, budget = getattr(args, "method", None), getattr(args, "budget", None)
    changes = {} if budget is None else {"budget": budget}
    if name is not None:
        return preset(name, **changes)
    if budget is not None and not config.method.sparse:
        raise ConfigError("--budget is for sparse methods: name one with --method, e.g. headrace")
    try:
        return msgspec.structs.replace(config.method, **changes)
    except msgspec.ValidationError as error:
        raise ConfigError(f"method: {error}") from error


def _remote(url: str, configured: RemoteConfig | None) -> RemoteConfig:
    """The server of `--remote`, with the configuration's other settings of it."""
    if configured is None:
        return RemoteConfig(url=url)
    return msgspec.structs.replace(configured, url=url)


def _disk_path(args: Namespace, config: EngineConfig) -> str | None:
    if getattr(args, "no_store", False):
        return None
    if args.store is not None:
        return str(args.store)
    return config.store.disk_path or str(default_store())


def open_engine(args: Namespace, config: EngineConfig | None = None) -> "Engine":
    """The engine that the options ask for. Close it: that may fail, on a full disk."""
    config = config or engine_config(args)
    with busy(f"loading {args.model}"):
        quiet()
        import torch

        from engine.engine import Engine

        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        return Engine.from_pretrained(
            args.model, config, adapter=args.adapter, dtype=dtype, device=args.device
        )


def quiet() -> None:
    """Keep the chatter of libraries off stderr; what headrace warns of is one line each."""
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.basicConfig(format="headrace: %(message)s", level=logging.WARNING)


def read_text(path: str) -> str:
    """A user's text file; "-" is standard input. PromptError if it cannot be read as UTF-8."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror}") from error
    return decoded(data, path)


def decoded(data: bytes, name: str) -> str:
    """What a user gave as bytes, under the name of where it came from."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        ) from error


def sampling(args: Namespace) -> dict[str, Any]:
    """The options that `Engine.stream` takes."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def show(events: "Iterator[Event]", *, as_json: bool, strip: bool = False) -> "Completion":
    """Print a text while it comes, or as one JSON line; what it cost goes to stderr.

    Args:
        strip: leave out white space before the first word.
    """
    for event in events:
        text = event.text.lstrip() if strip else event.text
        strip = strip and not text
        if not as_json:
            print(text, end="", flush=True)
    assert event.completion is not None, "a stream ends with a completion"
    completion = event.completion
    stats = completion.stats
    if as_json:
        numbers = asdict(stats) | {"decode_tokens_per_s": stats.decode_tokens_per_s}
        print(json.dumps(asdict(completion) | {"stats": numbers}), flush=True)
    else:
        print(flush=True)
    progress().print(
        f"{stats.prompt_tokens:,} prompt tokens, {stats.cached_tokens:,} of them from the store; "
        f"first token after {stats.ttft_s:.3f} s, then {stats.decode_tokens_per_s:.0f} tokens/s",
        style="dim",
        soft_wrap=True,
    )
    return completion
