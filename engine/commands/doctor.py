"""`headrace doctor`: what is installed, what the machine has, and whether the store is sound."""

import json
import platform
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.commands.session import engine_config
from engine.commands.store import open_disk
from engine.config import EngineConfig
from engine.kernels.attend_token import SOURCE
from kvstore.errors import StoreError
from native.library import library
from native.threads import cores

PACKAGES = ("headrace", "torch", "transformers", "triton", "lmdb", "numpy")


def run(args: Namespace) -> int:
    store = _store(engine_config(args))
    findings = {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "devices": _devices(),
        "extras": {"faiss": _faiss(), "CPU kernels": _kernels()},
        "store": store,
    }
    if args.json:
        print(json.dumps(findings))
    else:
        _print(findings)
    return 0 if store["health"] in ("sound", "none yet") else 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    bf16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    devices = {
        "cpu": f"{cores()} cores, {torch.get_num_threads()} threads, {bf16} bf16 instructions"
    }
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        devices[f"cuda:{number}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        devices["cuda"] = "none"
    return devices


def _kernels() -> str:
    compiled = library(SOURCE) is not None
    return (
        "compiled" if compiled else "not compiled: decode on a CPU is slower without a C compiler"
    )


def _faiss() -> str:
    if find_spec("faiss"):
        return "installed"
    extra = "gpu" if torch.cuda.is_available() else "cpu"
    return f"missing (optional): pip install 'headrace[{extra}]'"


def _store(config: EngineConfig) -> dict[str, Any]:
    """Health of the store, from a full audit."""
    path = Path(str(config.store.disk_path))
    if not path.exists():
        return {"path": str(path), "health": "none yet"}
    try:
        _, store = open_disk(config, check=True)
        with store:
            report = store.audit()
    except StoreError as error:
        return {"path": str(path), "health": str(error)}
    health = "sound" if report.clean else "damaged: run headrace store audit --repair"
    return {"path": str(path), "health": health, "blocks": report.blocks, "bytes": report.nbytes}


def _print(findings: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for section, facts in findings.items():
        for row, (name, value) in enumerate(facts.items()):
            table.add_row("" if row else section, name, str(value))
    Console(highlight=False, markup=False).print(table)
