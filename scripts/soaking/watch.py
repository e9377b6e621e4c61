"""What is looked at once a window, and what must hold of all of them."""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

FILE_SHARE = 1.05  # of the budget
MEMORY_SHARE = 1.02  # the last third of windows beside the second
SLOWER = 1.25


class Window(NamedTuple):
    """Some seconds of a soak; times are of one block, read with its conversation."""

    reads: int
    p50_s: float
    p99_s: float
    file_bytes: int
    resident_bytes: int

    @classmethod
    def of(cls, times: Sequence[float], file_bytes: int, resident_bytes: int) -> "Window":
        p99 = quantiles(times, n=100)[98] if len(times) > 1 else times[0]
        return cls(len(times), median(times), p99, file_bytes, resident_bytes)

    def __str__(self) -> str:
        return (
            f"{self.reads} reads, {1e3 * self.p50_s:.2f} ms a block (p99 {1e3 * self.p99_s:.2f}), "
            f"file {self.file_bytes / 2**30:.3f} GiB, memory {self.resident_bytes / 2**20:.0f} MiB"
        )


def resident_bytes() -> int:
    """Of this process, without what files back: the page cache is not its own."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024


def verdict(windows: Sequence[Window], budget_bytes: int, wrong_blocks: int) -> list[str]:
    """What is not as it must be, in sentences."""
    if len(windows) < 3:
        return [f"{len(windows)} windows are too few to compare thirds of: run it longer"]
    third = len(windows) // 3
    middle, last = windows[-2 * third : -third], windows[-third:]
    found = [f"{wrong_blocks} blocks were not what was written"] if wrong_blocks else []
    share = max(w.file_bytes for w in windows) / budget_bytes
    if share > FILE_SHARE:
        found.append(f"the file took {share:.3f} of the budget: {FILE_SHARE} is allowed")
    memory = median(w.resident_bytes for w in last) / median(w.resident_bytes for w in middle)
    if memory > MEMORY_SHARE:
        found.append(f"memory grew by {memory - 1:.1%}: {MEMORY_SHARE - 1:.0%} is allowed")
    slower = median(w.p50_s for w in last) / median(w.p50_s for w in middle)
    if slower > SLOWER:
        found.append(f"reads became {slower:.2f} times as slow: {SLOWER} is allowed")
    return found
