"""What all profiles share: options, the model, and the server's configuration."""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from serve_bench.process import ROOT, Server, headrace
from serve_bench.texts import Texts

MIB = 1 << 20
SERVED = "bench"  # what the clients call the model


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the script.

    Args:
        folder: for this run's files, which go when it ends.
        positions: prompt and answer together, at most.
    """

    options: Namespace
    folder: Path
    model: Path
    texts: Texts
    positions: int

    @contextmanager
    def serve(self, name: str, **tables: Mapping[str, Any]) -> Iterator[Server]:
        """Our server, with a store of its own.

        Args:
            tables: of the configuration; settings without a table are in `engine`.
        """
        config = self.folder / f"{name}.toml"
        store = {"disk_path": str(self.folder / f"{name}-store")} | dict(tables.pop("store", {}))
        serve = {"aliases": [SERVED]} | dict(tables.pop("serve", {}))
        config.write_text(toml(tables.pop("engine", {}), tables | {"store": store, "serve": serve}))
        log = self.folder / f"{name}.log"
        with headrace(str(self.model), config, log, threads=self.options.threads) as server:
            yield server


def bench(options: Namespace, folder: Path) -> Bench:
    """The model of `--model` and all that comes from it."""
    model = Path(options.model)
    if not model.exists():
        model = ROOT / "models" / options.model
    tokenizer = AutoTokenizer.from_pretrained(model)
    positions = AutoConfig.from_pretrained(model).max_position_embeddings
    return Bench(options, folder, model, Texts(tokenizer), positions)


def toml(top: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings as TOML; strings, numbers, booleans and lists are written as in JSON."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in top.items()]
    for table, settings in tables.items():
        lines += [f"[{table}]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join([*lines, ""])


def body(prompt: str | list[int], new_tokens: int, **more: Any) -> dict[str, Any]:
    """A request for `/v1/completions` that ends with its usage."""
    made = {"model": SERVED, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
    return made | {"stream_options": {"include_usage": True}} | more


def real_trace() -> Path | None:
    """Azure's trace, where $HEADRACE_DATA has it."""
    path = Path(os.environ.get("HEADRACE_DATA", "."), "traces", "azure_2023_conv.csv")
    return path if path.exists() else None
