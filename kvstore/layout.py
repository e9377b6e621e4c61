"""How a block is cut into stored values: runs of layers of about 2 MiB."""

from collections.abc import Sequence
from itertools import groupby

TARGET_BYTES = 2 << 20


def group_size(num_layers: int, layer_bytes: int) -> int:
    """Layers per stored value.

    2 MiB is large enough for full disk speed (values begin a page: those of 64 KiB waste 6 % of
    them, of 1 MiB 0.4 %) and small enough that a checksum follows its copy within the CPU's caches.
    """
    return max(1, min(num_layers, round(TARGET_BYTES / layer_bytes)))


def layer_groups(num_layers: int, layer_bytes: int) -> list[range]:
    """The runs of layers that are stored, and best read, together.

    Args:
        layer_bytes: of K and V of one block in one layer.
    """
    return runs(num_layers, group_size(num_layers, layer_bytes))


def runs(num_layers: int, size: int) -> list[range]:
    return [range(lo, min(lo + size, num_layers)) for lo in range(0, num_layers, size)]


def covering(num_layers: int, size: int, layers: range) -> list[tuple[int, range]]:
    """The runs of `size` layers that hold some of `layers`, each with its number."""
    numbers = range(layers.start // size, -(-layers.stop // size))
    return [(i, range(i * size, min(i * size + size, num_layers))) for i in numbers]


def gaps(found: Sequence[bool]) -> list[slice]:
    """Where what is missing lies, run by run."""
    grouped = groupby(range(len(found)), found.__getitem__)
    missing = [list(run) for is_there, run in grouped if not is_there]
    return [slice(run[0], run[-1] + 1) for run in missing]
