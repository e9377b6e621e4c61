"""One fetch for all who want the same block at the same time."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

from kvstore.block import BlockKey, KVBlock


class Flights:
    """Blocks on their way to this process. Whoever claims some must land them, come what may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: dict[bytes, Future[KVBlock | None]] = {}

    def claim(
        self, keys: Sequence[BlockKey]
    ) -> tuple[list[BlockKey], dict[bytes, "Future[KVBlock | None]"]]:
        """Keys that the caller is to fetch, and the flights of those that others fetch."""
        mine: list[BlockKey] = []
        others: dict[bytes, Future[KVBlock | None]] = {}
        with self._lock:
            for key in dict.fromkeys(keys):
                if flight := self._coming.get(key.digest):
                    others[key.digest] = flight
                    continue
                self._coming[key.digest] = Future()
                mine.append(key)
        return mine, others

    def land(self, keys: Sequence[BlockKey], blocks: Mapping[bytes, KVBlock]) -> None:
        """End the flights of `keys`; those without a block are a miss for all."""
        with self._lock:
            flights = [(key.digest, self._coming.pop(key.digest)) for key in keys]
        for digest, flight in flights:
            flight.set_result(blocks.get(digest))
