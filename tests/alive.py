"""What memory tensors take while something runs, by the books of torch's allocator."""

from typing import NamedTuple

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class Taken(NamedTuple):
    """Bytes of what was made since the start, in the thread that ran it.

    heap: the end of a heap that gives back only what lies at its end, and never uses a hole
        again. glibc's is like that at worst: large blocks are freed, small ones between them are
        not, and aligned blocks do not fit into holes of just their size (its bug 14581).
    """

    most: int
    heap: int


def taken(run):
    """Call `run`; the most bytes it had alive at once, however briefly, and the heap for them."""
    most = alive = heap = 0
    ends = {}  # of live blocks in that heap, by address
    for address, nbytes in _allocations(run):
        alive += nbytes if nbytes > 0 or address in ends else 0
        if nbytes > 0:
            ends[address] = max(ends.values(), default=0) + nbytes
            most, heap = max(most, alive), max(heap, ends[address])
        else:
            ends.pop(address, None)  # it may have been there before
    return Taken(most, heap)


def _allocations(run):
    """Addresses and sizes, negative where freed, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    found, left = [], list(seen.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left += event.children
        if event.typed[0] == _EventType.Allocation:
            found.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size))
    assert found, "torch reported no memory"
    return [block for _, *block in sorted(found, key=lambda block: block[0])]
