"""How threads share the CPU's cores."""

import os
import threading
from contextlib import suppress

import torch

_SETTING = threading.Lock()


def cores() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_one_core() -> None:
    """Have torch compute with one thread in this thread, for helpers beside one that needs all.

    `torch.set_num_threads` also says with how many those threads begin that come later, so another
    thread puts that back.
    """
    with _SETTING:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        back = threading.Thread(target=torch.set_num_threads, args=(others,))
        back.start()
        back.join()


def be_patient() -> None:
    """Let this thread, and those that it starts, not interrupt others: they wait for a turn.

    For threads that often wake up to do little, beside those that compute. They get as much time as
    before.
    """
    if hasattr(os, "SCHED_BATCH"):  # on Linux
        with suppress(OSError):  # sandboxes and C libraries that know no policies
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
