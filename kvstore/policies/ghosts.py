"""Names of blocks that went, for policies that learn from their return."""

from collections import OrderedDict


class Ghosts:
    """Names, first gone first, with the sizes they had."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._sizes

    def add(self, digest: bytes, nbytes: int) -> None:
        """Remember a block that goes."""
        self.discard(digest)
        self._sizes[digest] = nbytes
        self.nbytes += nbytes

    def discard(self, digest: bytes) -> bool:
        """Forget a block; whether it was here."""
        size = self._sizes.pop(digest, None)
        self.nbytes -= size or 0
        return size is not None

    def trim(self, nbytes: int) -> None:
        """Forget those that went first, until the sizes of the others sum to at most `nbytes`."""
        while self._sizes and self.nbytes > nbytes:
            self.nbytes -= self._sizes.popitem(last=False)[1]
