"""An environment of its own for LMCache, which pins a NumPy that is older than ours."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from native.folders import cache_folder

LMCACHE = "lmcache==0.5.6"
TORCH = "torch==2.13.0"
# All that the two backends import, within the bounds that LMCache sets. Its other requirements are
# CUDA libraries, engines, remote stores and servers.
NEEDED = (
    "numpy==2.2.6", "numba", "msgspec", "pyyaml", "sortedcontainers", "cachetools", "psutil",
    "py-cpuinfo", "prometheus_client>=0.18.0,<=0.24.1", "pyzmq>=25.0.0", "aiohttp", "aiofile",
    "requests", "cryptography", "transformers>=5.4",
)  # fmt: skip


class NoLMCache(Exception):
    """LMCache cannot be installed here; says why."""


def environment(folder: Path | None = None) -> Path:
    """Python of an environment with LMCache; made there, or in the user's cache, at the first call.

    Torch comes from the index that HEADRACE_TORCH_INDEX names, as in scripts/install: PyPI's is
    built for CUDA, and LMCache's backends in host memory and on disk need none.

    Raises:
        NoLMCache: a package could not be had.
    """
    folder = folder or cache_folder() / "bench-lmcache"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join([TORCH, LMCACHE, *NEEDED])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making an environment for {LMCACHE} in {folder}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    index = os.environ.get("HEADRACE_TORCH_INDEX")
    _pip(python, [*(["--index-url", index] if index else []), TORCH])
    _pip(python, ["--no-deps", LMCACHE])
    _pip(python, [*NEEDED, TORCH])
    stamp.write_text(wanted)
    return python


def _pip(python: Path, arguments: Sequence[str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", *arguments])


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        raise NoLMCache(f"{' '.join(command)}: {said.splitlines()[-1]}") from error
