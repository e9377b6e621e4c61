"""What a result says about where it comes from: versions, commit, machine, memory."""

import ctypes
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "headrace",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu-cu12",
)
TASK_PACKAGES = ("wonderwords", "datasets", "jieba", "rouge")  # what tasks and scores depend on
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides which CPU kernels torch runs
PROCESS = Path("/proc/self")


def versions() -> dict[str, str]:
    """Of Python, and of the packages that are installed of those that results depend on."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *TASK_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of this checkout, with `+` behind it where tracked files differ; "unknown" without one."""
    try:
        if _git("rev-parse", "--show-prefix"):
            return "unknown"  # installed in the checkout of another project
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, and what of it the model runs on."""
    facts: dict[str, Any] = {
        "device": f"{_cpuinfo('model name') or platform.processor()}, {os.cpu_count()} cores",
        "flags": [flag for flag in FLAGS if flag in _cpuinfo("flags").split()],
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        facts |= {"cpu": facts["device"], "device": torch.cuda.get_device_name(device)}
        facts["cuda"] = torch.version.cuda
    return facts


def reset_peak(device: torch.device) -> None:
    """Start to measure peak memory anew.

    What is free, but not yet the system's, is given back first: it would hide what comes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (path := PROCESS / "clear_refs").exists():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
            trim(0)  # 33 MB of KV were seen as 0.2 without
        path.write_text("5")  # VmHWM back to what is resident now


def peak_bytes(device: torch.device) -> int | None:
    """The most memory since `reset_peak`, of the device or resident; None where no one knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    path = PROCESS / "status"
    found = re.findall(r"VmHWM:\s+(\d+) kB", path.read_text()) if path.exists() else []
    return int(found[0]) * 1024 if found else None


def digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of all files in it with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return digest_files(path, sorted(file for file in path.rglob("*") if file.is_file()))


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of some files of a folder, in this order, with their names."""
    lines = [f"{file.relative_to(folder).as_posix()} {digest(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _git(*words: str) -> str:
    run = ["git", "-C", str(ROOT), *words]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
