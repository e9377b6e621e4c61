"""How threads share the CPU's cores."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from native.threads import be_patient, cores


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
