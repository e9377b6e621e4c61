"""What a disk tier holds, and how old it is."""

import time
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from kvstore.codecs.known import CODECS
from kvstore.disk.tier import DiskTier
from kvstore.tally import Group, Usage


class Ages(NamedTuple):
    """Seconds since blocks were stored or used last."""

    youngest_s: float
    median_s: float
    oldest_s: float


def ages(tier: DiskTier, now_ns: int | None = None) -> Ages | None:
    """Of all blocks; None without any."""
    now = time.time_ns() if now_ns is None else now_ns
    with tier.access.reading() as txn:
        stamps = [entry.stamp for entry in tier.access.ledger.entries(txn)]
    if not stamps:
        return None
    since = [max(0, now - stamp) / 1e9 for stamp in stamps]  # the clock may have been set back
    return Ages(min(since), median(since), max(since))


def rows(groups: Mapping[Group, Usage]) -> list[dict[str, str | int]]:
    """Who has how much, largest first, with a tenant's tag for its name."""
    ordered = sorted(groups.items(), key=lambda item: -item[1].nbytes)
    return [
        {
            "tenant": group.tenant.hex(),
            "class": group.kind.name.lower(),
            "codec": CODECS[group.codec].name,
            "blocks": usage.blocks,
            "bytes": usage.nbytes,
        }
        for group, usage in ordered
    ]
