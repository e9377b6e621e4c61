"""What a block rests on, for tiers that take it only with that."""

from collections.abc import Callable, Sequence

from kvstore.tier import Item, Tier


def with_ancestors(
    batch: Sequence[Item], tier: Tier, find: Callable[[bytes], Item | None]
) -> list[Item]:
    """The batch, behind blocks that it rests on and that only a faster tier has left.

    Args:
        find: a block in memory.
    """
    own = {key.digest for key, _ in batch}
    missing: list[Item] = []
    for key, _ in batch:
        chain: list[Item] = []
        parent = key.parent
        while parent is not None and parent not in own and (item := find(parent)):
            if item[0] in tier:
                break
            chain.insert(0, item)
            own.add(parent)
            parent = item[0].parent
        missing += chain
    return [*missing, *batch]
