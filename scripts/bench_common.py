"""What every benchmark record says about where its numbers come from."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evals import facts as known  # noqa: E402  (needs the path)


def facts(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions and device, for one line of a results file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": known.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **known.hardware(device),
        "load_average": round(os.getloadavg()[0], 1),
    }


def reset_peak(device: torch.device) -> int:
    """Start to measure peak memory anew; what is in use now, in bytes."""
    known.reset_peak(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `reset_peak`: of the device, or resident in this process."""
    found = known.peak_bytes(device)
    assert found is not None, "peak memory needs Linux, or a GPU"
    return found


def save(name: str, record: dict[str, Any]) -> Path:
    """Append `record` to benchmarks/results/<name>_<date>.jsonl."""
    path = ROOT / "benchmarks" / "results" / f"{name}_{record['date'][:10]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return path
