"""Whose blocks a tier has, by names that a server may show."""

from collections import Counter
from collections.abc import Mapping
from typing import Final, TypeAlias

from kvstore.block import Kind
from kvstore.codecs.known import CODECS
from kvstore.tally import Groups, Usage

OTHER: Final = "other"  # tenants that are not configured, all together

Names: TypeAlias = Mapping[bytes, str]  # of configured tenants, by their tags
Label: TypeAlias = tuple[str, ...]  # tenant, codec, class; or tenant, class


def usage(groups: Groups, names: Names) -> dict[Label, Usage]:
    """What tenants have, by codec and exactness class."""
    found: dict[Label, Usage] = {}
    for group, part in groups.items():
        label = names.get(group.tenant, OTHER), CODECS[group.codec].name, class_of(group.kind)
        found[label] = found.get(label, Usage()).plus(*part)
    return found


def counts(numbers: Mapping[tuple[bytes, Kind], int], names: Names) -> Counter[Label]:
    """Numbers of tenants, by exactness class."""
    found: Counter[Label] = Counter()
    for (tenant, kind), number in numbers.items():
        found[names.get(tenant, OTHER), class_of(kind)] += number
    return found


def class_of(kind: Kind) -> str:
    """What blocks of a kind are good for, as a label."""
    return kind.name.lower()
