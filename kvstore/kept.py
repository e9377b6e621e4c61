"""Where blocks of other machines stay in this one."""

from collections.abc import Sequence

from kvstore.block import KVBlock
from kvstore.disk.writer import Writer
from kvstore.level import Level
from kvstore.pins import Pins
from kvstore.spares import Spares
from kvstore.tier import HostTier, Item


class Kept:
    """A `Keeper`: the fastest tier in memory, and what the disk's writer has room for."""

    def __init__(
        self, fast: Sequence[Level], writer: Writer | None, pins: Pins, spares: Spares
    ) -> None:
        self._fast, self._writer, self._pins = fast, writer, pins
        self.empty = spares.empty

    def room(self) -> int:
        return self._fast[0].room(self._pins.digests()) if self._fast else 0

    def find(self, digest: bytes) -> KVBlock | None:
        hosts = [level.tier for level in self._fast if isinstance(level.tier, HostTier)]
        item = next((item for host in hosts if (item := host.find(digest))), None)
        return None if item is None else item[1]

    def keep(self, blocks: Sequence[Item]) -> None:
        for level in self._fast:
            level.insert(blocks)
        if self._writer is not None:
            self._writer.offer(blocks)
