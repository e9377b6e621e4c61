"""What benchmarks share: where numbers come from, how they are taken, where they go."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
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


def random_qwen3(
    shape: dict[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> transformers.PreTrainedModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("qwen3", **shape)
    model: transformers.PreTrainedModel
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().to(device)
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(theirs: Iterable[float], ours: Iterable[float]) -> float:
    """The median over rounds, as the machine's pace changes."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that `finish` obeys."""
    parser.add_argument("--json", action="store_true", help="one JSON line instead of the table")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")


def finish(
    name: str,
    record: dict[str, Any],
    options: argparse.Namespace,
    said: object,
    show: Callable[[], object],
) -> None:
    """Keep a record if that is asked for; on stdout, what is `said` as JSON, or the table."""
    if options.save:
        print(f"saved to {save(name, record)}", file=sys.stderr)
    if options.json:
        print(json.dumps(said))
    else:
        show()


def save(name: str, record: dict[str, Any]) -> Path:
    """Append `record` to benchmarks/results/<name>_<date>.jsonl."""
    path = ROOT / "benchmarks" / "results" / f"{name}_{record['date'][:10]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return path
