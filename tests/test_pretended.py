"""The pretended GPU: what it refuses a real one refuses too, and the path on a GPU takes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.batch.capture import capturing
from engine.kernels.norm_rows import norm_rows_triton

ROOT = Path(__file__).resolve().parent.parent
ON_IT = [  # tests for a GPU that do not take long
    "tests/test_pretended.py",
    "tests/test_pretended_order.py",
    "tests/test_gpu_check.py::test_on_a_gpu_every_trial_of_a_kernel_agrees_with_its_definition",
    "tests/engine/test_staging.py::test_loading_comes_between_what_is_launched_before_and_after",
    "tests/engine/test_staging.py::test_a_layer_may_go_while_what_reads_it_has_not_run",
    "tests/engine/test_staging.py::test_recorded_blocks_may_go_while_the_loop_writes_to_them",
    "tests/kvstore/pool/test_pool.py::test_blocks_are_given_back_when_what_a_gpu_sent_is_there",
    "tests/kvstore/pool/test_pool.py::test_what_a_gpu_sends_is_there_when_it_is_read[codec0]",
    "tests/engine/test_gpu.py::test_logits_on_a_gpu_are_those_of_the_cpu[gemma2]",
    "tests/engine/test_gpu.py::test_a_blend_is_that_of_the_cpu[boundary]",
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they run on it")
def test_tests_for_a_gpu_pass_on_a_pretended_one():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.pretended", "-m", "gpu", *ON_IT]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "28 passed" in done.stdout


@pytest.mark.gpu
def test_tensors_are_where_they_were_made_or_brought():
    made, brought = torch.zeros(3, device="cuda"), torch.zeros(3).cuda()
    for x in (
        made,
        brought,
        made[1:],
        made + brought,
        made.new_empty(2),
        torch.cat([made, brought]),
    ):
        assert x.device == torch.device("cuda", 0)
        assert x.is_cuda
        assert not x.cpu().is_cuda
    assert not torch.zeros(3).is_cuda
    assert torch.empty(3, pin_memory=True).is_pinned()
    with pytest.raises(TypeError, match="numpy"):
        made.numpy()


@pytest.mark.gpu
def test_devices_do_not_mix():
    here, there = torch.zeros(3), torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError):
        here + there
    with pytest.raises(RuntimeError):
        torch.cat([here, there])
    with pytest.raises(RuntimeError):
        here[torch.zeros(1, dtype=torch.long, device="cuda")]
    assert torch.equal((there + torch.tensor(1.0)).cpu(), torch.ones(3))  # a number may
    with pytest.raises(RuntimeError):
        torch.rand(3, device="cuda", generator=torch.Generator())


@pytest.mark.gpu
def test_a_kernel_takes_no_pageable_memory():
    x, weight = torch.ones(2, 64), torch.ones(64)
    with pytest.raises(ValueError, match=r"cpu tensor|of the CPU"):
        norm_rows_triton(x.cuda(), weight, 1e-6)
    want = norm_rows_triton(x.cuda(), weight.cuda(), 1e-6)
    locked = torch.empty(64, pin_memory=True).copy_(weight)
    assert torch.equal(norm_rows_triton(x.cuda(), locked, 1e-6), want)


@pytest.mark.gpu
def test_a_graph_runs_when_it_is_replayed_on_what_is_there_then():
    count, by, weight = (torch.ones(64, device="cuda") for _ in range(3))
    norm_rows_triton(count[None], weight, 0.0)  # no capture compiles it
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with capturing(graph, stream):
        count += by
        twice = norm_rows_triton(count[None] * 2, weight, 0.0)
    assert (count.cpu() == 1).all()
    by.fill_(2)
    for steps in (1, 2):
        graph.replay()
        torch.cuda.synchronize()
        assert (count.cpu() == 1 + 2 * steps).all()
        assert torch.allclose(twice.cpu(), torch.ones(1, 64))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "wait", [torch.Tensor.item, lambda x: x[x > 0]], ids=["a number", "a mask as an index"]
)
def test_a_capture_waits_for_nothing(wait):
    one, stream = torch.ones(1, device="cuda"), torch.cuda.Stream()
    with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph(), stream):
        wait(one)
    assert wait(one) == 1
