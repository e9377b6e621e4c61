"""The benchmark of packed prompts: its tokens are counted here, its seconds only reported."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_packed.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("bench_packed", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("batch", [8, 32])
def test_packed_prompts_compute_their_own_tokens_and_padded_ones_the_longest_for_each(bench, batch):
    module = bench.build_model(bench.TINY, torch.device("cpu"))
    model, counted = bench.HFModel(module), []
    for layer in model.layers:
        layer.qkv = lambda x, qkv=layer.qkv: (counted.append(len(x)), qkv(x))[1]
    counts = bench.lengths(batch, 0.02)
    prompts = [torch.randint(3, 200, (n,)) for n in counts]
    rows = bench.packed(model, prompts, 128)
    assert sum(counted) == sum(counts)
    assert set(counted[:-1]) == {128}  # every step but the last one is full
    for a, b in zip(rows, bench.separate(model, prompts, 128), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(rows, bench.theirs(module, prompts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    counted.clear()
    bench.padded(model, prompts, 128)
    assert sum(counted) == batch * max(counts)


def test_lengths_are_those_of_the_trace(bench):
    counts = sorted(bench.lengths(4000, 1.0))
    assert abs(sum(counts) / 4000 - 1155) < 40
    assert abs(counts[2000] - 1020) < 30
    padded = [max(x) * 8 / sum(x) for x in (bench.lengths(8, 1.0, seed) for seed in range(300))]
    assert 2.3 < sum(padded) / 300 < 2.7  # 2.52 in the trace


@pytest.mark.slow
def test_the_benchmark_ends_with_one_json_line():
    run = [sys.executable, SCRIPT, "--json", "--tiny", "--device", "cpu", "--scale", "0.02"]
    run += ["--rounds", "2", "--batches", "8"]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    numbers = json.loads(out.splitlines()[-1])
    named = ("efficiency", "speedup", "over_transformers", "over_separate")
    assert set(numbers) == {f"{name}_8" for name in named}
    assert all(x > 0 for x in numbers.values())
