"""What every benchmark record says about where its numbers come from."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides which CPU kernels torch runs


def facts(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions and device, for one line of a results file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(device),
        "flags": [flag for flag in FLAGS if flag in _cpuinfo("flags").split()],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """The commit of this checkout, with `+` behind it where tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpuinfo('model name') or platform.processor()}, {os.cpu_count()} cores"


def reset_peak(device: torch.device) -> int:
    """Start to measure peak memory anew; what is in use now, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM back to what is resident now
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: of the device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def save(name: str, record: dict[str, Any]) -> Path:
    """Append `record` to benchmarks/results/<name>_<date>.jsonl."""
    path = ROOT / "benchmarks" / "results" / f"{name}_{record['date'][:10]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return path


def _git(*words: str) -> str:
    run = ["git", "-C", str(ROOT), *words]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
