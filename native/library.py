"""C kernels for the CPU, compiled once by the machine that runs them."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from native.folders import cache_folder

log = logging.getLogger(__name__)

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-w"]


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`, a C file; None, said once, where it cannot be compiled.

    Compiled code is kept in the user's cache folder, by source, flags and processor. With OpenMP
    it shares torch's threads: torch's own libgomp answers for the one it asks for.
    """
    try:
        return _loaded(_compiled(source))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip() or str(error)
        why = said.splitlines()[0]
        log.warning("%s is not compiled, which is slower on a CPU: %s", source.stem, why)
        return None


def function(source: Path, name: str, arguments: Sequence[Any]) -> Callable[..., None]:
    """One function of the compiled `source`, which takes these arguments as plain numbers.

    Given numbers, ctypes makes no objects for them at every call.
    """
    code = library(source)
    assert code is not None, f"{source.stem} was called where it cannot be: ask serves() first"
    found = getattr(code, name)
    if found.argtypes is None:
        found.argtypes, found.restype = list(arguments), None
    return found


def value(source: Path, name: str) -> int:
    """What a function of the compiled `source` that takes nothing says of this machine."""
    code = library(source)
    assert code is not None, f"{source.stem} was asked where it is not compiled"
    return int(getattr(code, name)())


def _loaded(compiled: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(compiled))
    except OSError:
        compiled.unlink()  # damaged: made anew at the next start
        raise


def _compiled(source: Path) -> Path:
    """Path of the shared library, compiled now if this machine has not yet."""
    code = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    digest = hashlib.sha256(b"\0".join([*code, *map(str.encode, FLAGS), _processor()])).hexdigest()
    target = cache_folder() / "native" / f"{source.stem}-{digest[:20]}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            run = [*_compiler(), *FLAGS, str(source), "-o", str(made), "-lm"]
            subprocess.run(run, check=True, capture_output=True, errors="replace", timeout=120)
            made.replace(target)
    return target


def _compiler() -> list[str]:
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"the environment variable CC is no command: {error}") from error
    for words in (asked, ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return words
    raise FileNotFoundError("no C compiler (cc, gcc or clang) is on the PATH")


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        known = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    except OSError:
        known = []
    return "\n".join([platform.machine(), *sorted(set(known))]).encode()
