"""Kernels for a GPU: which specialisations there are, and what they compile to without one.

    python -m native.gpu MODULE... [--arch 80 90 100] [--json]

compiles every `Build` in the `AOT` lists of the modules and reports registers, shared memory and
spills. Kernels decorated under TRITON_INTERPRET cannot be compiled any more, which is why tests
run this command in a process of its own. Triton is imported where it is used: a machine without
it imports this module.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

ARCHES = (80, 90, 100)
INTEGERS = {"i32", "i64"}
TRUE = {"1", "true", "on", "yes", "y"}  # as triton reads a switch from the environment


@dataclass(frozen=True, slots=True)
class Build:
    """One specialisation of a kernel, for ahead-of-time compilation."""

    name: str  # "score_codes, 64 codes, G=4"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # argument -> triton's type: "*u8", "i32", ...; or "constexpr"
    constants: dict[str, Any]  # values of the constexprs
    num_warps: int = 4
    num_stages: int = 3
    spills: str | None = None  # why this build may spill registers; None: it must not


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a compiled kernel needs: registers a thread, the rest in bytes."""

    registers: int
    shared_bytes: int
    spill_bytes: int  # stores and loads
    stack_bytes: int


def interpreted() -> bool:
    """TRITON_INTERPRET is set: kernels run on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in TRUE


def on_gpu(*tensors: Tensor | None) -> bool:
    """All tensors (that are not None) are on a CUDA device: the kernels can take them."""
    return all(tensor.is_cuda for tensor in tensors if tensor is not None)


def compiled(build: Build, arch: int) -> Resources:
    """What `build` needs on sm_`arch`, compiled without a GPU; Triton caches what it compiled.

    Pointers are taken to be aligned to 16 bytes, as those of whole tensors are, and numbers to be
    multiples of 16, as real sizes are: a launch compiles for that where it finds it.

    Raises:
        RuntimeError: if the kernel was decorated for the interpreter.
        ValueError: if the signature does not name the kernel's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(build.kernel, triton.JITFunction):
        raise RuntimeError(
            f"{build.name}: decorated for the interpreter; start Python without TRITON_INTERPRET"
        )
    signature, aligned = _ordered(build)
    source = ASTSource(build.kernel, signature, dict(build.constants), aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _resources(made.asm["ptx"], int(made.metadata.shared), arch)


def _ordered(build: Build) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """The signature in the order of the arguments, and which of them are multiples of 16."""
    names: list[str] = build.kernel.arg_names
    constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
    if set(names) != build.signature.keys() or constants != build.constants.keys():
        wrong = set(names) ^ build.signature.keys() or constants ^ build.constants.keys()
        raise ValueError(f"{build.name}: signature and arguments differ in {sorted(wrong)}")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if build.signature[name].startswith("*") or build.signature[name] in INTEGERS
    }
    return {name: build.signature[name] for name in names}, aligned


def _resources(ptx: str, shared_bytes: int, arch: int) -> Resources:
    """What the assembler says of `ptx`, with the shared memory that a launch asks for."""
    match = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    assert match, "PTX without a target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        run = [*_assembler(arch), f"--gpu-name={match[1]}", str(source), "-o", os.devnull]
        said = subprocess.run(run, check=True, capture_output=True, text=True).stderr
    stack, stores, loads = (
        max(map(int, re.findall(rf"(\d+) bytes {what}", said)), default=0)
        for what in ("stack frame", "spill stores", "spill loads")
    )
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return Resources(registers, shared_bytes, stores + loads, stack)


def _assembler(arch: int) -> list[str]:
    """The ptxas that triton itself uses, with those of its options that registers depend on."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    options = ["--regAllocOptLevel=2"] if newer else []
    return [str(get_ptxas(arch).path), "-v", "-lineinfo", *options]


def kernel_modules(root: Path) -> list[str]:
    """Modules with an `AOT` list, in the `kernels` folders of the packages in `root`."""
    files = sorted(root.glob("*/kernels/*.py"))
    found = [path for path in files if re.search(r"^AOT\b", path.read_text(), re.MULTILINE)]
    return [".".join(path.relative_to(root).with_suffix("").parts) for path in found]


def report(modules: Sequence[str], arches: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Module -> build -> "sm_90" -> the fields of `Resources`, or what went wrong as `error`."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for module in modules:
        builds: list[Build] = importlib.import_module(module).AOT
        found[module] = {
            build.name: {f"sm_{arch}": _outcome(build, arch) for arch in arches} for build in builds
        }
    return found


def _outcome(build: Build, arch: int) -> dict[str, Any]:
    try:
        return dataclasses.asdict(compiled(build, arch)) | {"may_spill": build.spills}
    except Exception as error:  # whatever a compiler raises is this build's result, not the end
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m native.gpu", description=__doc__)
    parser.add_argument("modules", nargs="+", metavar="MODULE")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHES))
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args()
    found = report(options.modules, options.arch)
    rows = [
        (name, arch, x)
        for builds in found.values()
        for name, arches in builds.items()
        for arch, x in arches.items()
    ]
    if options.json:
        print(json.dumps(found))
    for name, arch, x in [] if options.json else rows:
        said = x.get("error") or (
            f"{x['registers']} registers, {x['shared_bytes']} B shared, "
            f"{x['spill_bytes']} B spilled, {x['stack_bytes']} B stack"
        )
        print(f"{name}, {arch}: {said}")
    return int(any("error" in x for _, _, x in rows))


if __name__ == "__main__":
    sys.exit(main())
