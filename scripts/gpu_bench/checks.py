"""Checks that are no matter of time: tests in the interpreter and on the device, compilation."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_bench.process import ROOT, Done, parsed, run

# the versions of a machine that is not ours may warn of what others do not; an error of a thread,
# or of what nobody refers to any more, is one all the same
WARNINGS = [
    "default",
    "error::pytest.PytestUnhandledThreadExceptionWarning",
    "error::pytest.PytestUnraisableExceptionWarning",
]
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def cores() -> int:
    return min(len(os.sched_getaffinity(0)), 8)


def tests_of(module: str) -> list[str]:
    """The files that test a kernel: its own, or those that name it, or its callers' own."""
    package, _, name = module.rpartition(".kernels.")
    own = ROOT / "tests" / package / "kernels" / f"test_{name}.py"
    if own.exists():
        return [str(own.relative_to(ROOT))]
    tests = sorted((ROOT / "tests").glob("*/kernels/test_*.py"))
    named = [path for path in tests if module in path.read_text()]
    if named:
        return [str(path.relative_to(ROOT)) for path in named]
    callers = sorted(path for path in ROOT.glob("*/kernels/*.py") if _imports(path, module))
    return [file for path in callers for file in _own(path)]


def _imports(path: Path, module: str) -> bool:
    return bool(re.search(rf"^from {re.escape(module)} import", path.read_text(), re.MULTILINE))


def _own(path: Path) -> list[str]:
    test = ROOT / "tests" / path.parent.relative_to(ROOT) / f"test_{path.stem}.py"
    return [str(test.relative_to(ROOT))] if test.exists() else []


def interpreter(modules: Sequence[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Module -> how many of its tests passed, failed and were skipped, in the interpreter."""
    files = {module: tests_of(module) for module in modules}
    every = sorted({file for own in files.values() for file in own})
    by_file, done = pytest(every, limit_s, "not gpu and not slow", INTERPRETED, cores())
    none = {"error": "it has no test" if done.code in (0, 1) else done.why}
    return {
        module: _added([by_file[file] for file in own if file in by_file]) or none
        for module, own in files.items()
    }


def marked_gpu() -> list[str]:
    """Files with tests marked gpu, whole engines first, which take longest.

    Others may import what such a machine lacks.
    """
    files = [x for x in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in x.read_text()]
    files.sort(key=lambda path: (path.name != "test_gpu.py", path))
    return [str(path.relative_to(ROOT)) for path in files]


def gpu_tests(modules: Sequence[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """How the tests marked gpu went, in all."""
    by_file, done = pytest(marked_gpu(), limit_s, "gpu", {}, cores())
    total = _added(list(by_file.values())) or {"passed": 0}
    failed = {file: counts["failed"] for file, counts in by_file.items() if counts["failed"]}
    wrong = {} if done.code in (0, 1) else {"error": done.why}
    return {"all": total | ({"files": failed} if failed else {}) | wrong}


def pytest(
    files: Sequence[str], limit_s: float, marks: str, env: dict[str, str], workers: int
) -> tuple[dict[str, dict[str, int]], Done]:
    """Outcomes of tests, counted by file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
        command += ["-n", str(workers)] if workers > 1 else []
        command += [word for line in WARNINGS for word in ("-W", line)]
        done = run([*command, f"--junitxml={report}", *files], limit_s, env)
        return (_outcomes(report) if report.exists() else {}), done


def _outcomes(report: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        words = case.get("classname", "").split(".")  # of the file, then of a class if there is one
        file = next(
            (
                "/".join(words[:n]) + ".py"
                for n in range(len(words), 0, -1)
                if (ROOT / ("/".join(words[:n]) + ".py")).exists()
            ),
            "unknown",
        )
        counts = found.setdefault(file, {"passed": 0, "failed": 0, "skipped": 0})
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        counts["failed" if bad else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def _added(counts: Sequence[dict[str, int]]) -> dict[str, Any]:
    return {name: sum(one[name] for one in counts) for name in counts[0]} if counts else {}


def ahead(modules: Sequence[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Module -> whether all its builds compile for sm_90 as they should, and what they spill."""
    with ThreadPoolExecutor(cores()) as pool:
        return dict(
            zip(modules, pool.map(lambda module: _ahead(module, limit_s), modules), strict=True)
        )


def _ahead(module: str, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "native.gpu", module, "--arch", "90", "--json"]
    done = run(command, limit_s, {"TRITON_INTERPRET": "0"})
    lines = parsed(done.out)
    if not lines:
        return {"ok": False, "error": done.why}
    builds = {name: at["sm_90"] for name, at in lines[-1][module].items()}
    errors = {name: at["error"] for name, at in builds.items() if "error" in at}
    spills = {name: at["spill_bytes"] for name, at in builds.items() if at.get("spill_bytes")}
    loose = [name for name in spills if not builds[name]["may_spill"]]
    found = {"ok": bool(builds) and not errors and not loose, "builds": len(builds)}
    return found | {"spills": spills} | ({"errors": errors} if errors else {})


def sanitizer(modules: Sequence[str], limit_s: float) -> dict[str, dict[str, Any]]:
    """Whether memcheck finds fault with any kernel at toy sizes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"all": {"skipped": "there is no compute-sanitizer here"}}
    # calls that fail are for those who make them: PyTorch asks for what need not be there
    command = [tool, "--error-exitcode", "9", "--report-api-errors", "no", sys.executable]
    done = run([*command, "scripts/bench_gpu.py", "kernels", "--json", "--small"], limit_s)
    lines = [line for line in parsed(done.out) if "part" in line]
    wrong = {line["name"]: line["error"] for line in lines if "error" in line}
    if done.code == 0 and lines:
        return {"all": {"clean": len(lines)}}
    summary = [line for line in done.out.splitlines() if "ERROR SUMMARY" in line]
    said = json.dumps(wrong) if wrong else " ".join(summary) or done.why
    return {"all": {"ran": len(lines), "error": said[:500]}}
