"""Chunks in the order in which more of the prompt is stored exactly: nothing beats no repair."""

from collections.abc import Callable, Sequence

from engine.blend.segments import Segments


def best_order(segments: Segments, stored: Callable[[Sequence[int]], int]) -> tuple[int, ...]:
    """The chunks' numbers, greedily; those that reach no further keep their order behind the rest.

    Args:
        stored: how much of the start of some tokens is stored exactly.
    """
    order: list[int] = []
    left, reach = list(range(len(segments.chunks))), 0
    while left:
        heads = [stored(segments.ordered([*order, number]).context) for number in left]
        if max(heads) <= reach:
            break
        reach = max(heads)
        order.append(left.pop(heads.index(reach)))
    return (*order, *left)
