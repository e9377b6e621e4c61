"""How threads share the CPU's cores."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from native.threads import be_patient, cores, use_one_core


@pytest.fixture
def three():
    """Torch computes with three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_new_thread():
    """How many threads torch takes in one that comes later."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("three")
def test_a_helper_computes_with_one_core_and_nobody_else_does():
    barrier = threading.Barrier(8)  # so that each of them is there

    def count():
        barrier.wait()
        return torch.get_num_threads()

    with ThreadPoolExecutor(8, "helper", use_one_core) as threads:
        counts = [threads.submit(count) for _ in range(8)]
        assert [count.result() for count in counts] == [1] * 8
    assert torch.get_num_threads() == in_a_new_thread() == 3


def policy(_=None):
    return os.sched_getscheduler(0)


def test_a_patient_thread_is_so_alone():
    if not hasattr(os, "SCHED_BATCH"):
        pytest.skip("this system has no such policy")
    before = policy()
    with ThreadPoolExecutor(1, "patient", be_patient) as threads:
        assert threads.submit(policy).result() == os.SCHED_BATCH
    assert policy() == before


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_where_that_is_forbidden_or_unknown_it_is_as_it_was(monkeypatch, number):
    if not hasattr(os, "SCHED_BATCH"):
        pytest.skip("this system has no such policy")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with ThreadPoolExecutor(1, "patient", be_patient) as threads:
        assert threads.submit(policy).result() == policy()


def test_a_system_without_such_policies_counts_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "SCHED_BATCH", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    be_patient()
    assert cores() == (os.cpu_count() or 1)


def test_cores_are_those_that_this_process_may_use():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no such call")

    def one():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return cores()

    with ThreadPoolExecutor(1) as threads:  # the affinity is a thread's
        assert threads.submit(one).result() == 1
