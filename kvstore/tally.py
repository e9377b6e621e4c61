"""How much of a tier belongs to whom."""

import struct
from collections.abc import Iterable
from typing import NamedTuple

import lmdb

from kvstore.block import Kind
from kvstore.disk.environment import Environment

_PREFIX = b"group"
_NAME = struct.Struct("<8sBB")
_ROW = struct.Struct("<QQQ")  # bytes, blocks, and a check of both
_ONES = (1 << 64) - 1


class Group(NamedTuple):
    """Blocks that are counted together."""

    tenant: bytes  # `BlockKey.tenant`, 8
    kind: Kind
    codec: int  # of their payloads; see `kvstore.codecs`


class Usage(NamedTuple):
    """What a group takes of a tier's budget."""

    nbytes: int = 0
    blocks: int = 0

    def plus(self, nbytes: int, blocks: int) -> "Usage":
        return Usage(self.nbytes + nbytes, self.blocks + blocks)


Groups = dict[Group, Usage]


def counted(members: Iterable[tuple[Group, int]]) -> Groups:
    """The groups of blocks of so many bytes."""
    groups: Groups = {}
    for group, nbytes in members:
        change(groups, group, nbytes, 1)
    return groups


def change(groups: Groups, group: Group, nbytes: int, blocks: int) -> None:
    """Add to a group, or take from it; one without blocks is none."""
    after = groups.get(group, Usage()).plus(nbytes, blocks)
    if after.blocks:
        groups[group] = after
    else:
        groups.pop(group, None)


def of_tenants(groups: Groups) -> dict[bytes, int]:
    """Bytes by tenant."""
    totals: dict[bytes, int] = {}
    for group, usage in groups.items():
        totals[group.tenant] = totals.get(group.tenant, 0) + usage.nbytes
    return totals


class Tally:
    """Groups of a disk tier, kept in its table of numbers, in transactions of the caller.

    A row that was damaged stays as it is until all are set anew: who reads it counts the blocks.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env

    def read(self, txn: lmdb.Transaction) -> Groups | None:
        """All groups; None if there is doubt about one."""
        cursor, groups = txn.cursor(self._env.info), Groups()
        found = cursor.set_range(_PREFIX)
        while found and bytes(cursor.key()).startswith(_PREFIX):
            name, usage = bytes(cursor.key())[len(_PREFIX) :], _usage(cursor.value())
            if usage is None or len(name) != _NAME.size or name[8] not in set(Kind):
                return None
            tenant, kind, codec = _NAME.unpack(name)
            groups[Group(tenant, Kind(kind), codec)] = usage
            found = cursor.next()
        return groups

    def change(self, txn: lmdb.Transaction, group: Group, nbytes: int, blocks: int) -> None:
        """Add to a group, or take from it."""
        name = _PREFIX + _NAME.pack(*group)
        stored = txn.get(name, db=self._env.info)
        before = Usage() if stored is None else _usage(stored)
        if before is None:
            return
        after = before.plus(nbytes, blocks)
        if min(after) < 0 or not after.blocks:
            txn.delete(name, db=self._env.info)
            return
        txn.put(name, _ROW.pack(*after, _check(after)), db=self._env.info)

    def set(self, txn: lmdb.Transaction, groups: Groups) -> None:
        """Make these the groups, and no others."""
        cursor = txn.cursor(self._env.info)
        while cursor.set_range(_PREFIX) and bytes(cursor.key()).startswith(_PREFIX):
            cursor.delete()
        for group, usage in groups.items():
            self.change(txn, group, *usage)


def _usage(row: memoryview | bytes) -> Usage | None:
    """What a row says; None if it was damaged."""
    if len(row) != _ROW.size:
        return None
    nbytes, blocks, check = _ROW.unpack(row)
    usage = Usage(nbytes, blocks)
    return usage if check == _check(usage) else None


def _check(usage: Usage) -> int:
    return (usage.nbytes * 3 + usage.blocks * 5 + 1) & _ONES
