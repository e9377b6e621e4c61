"""Who has to go first."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from kvstore.policies.arc import ARC
from kvstore.policies.fifo import FIFO
from kvstore.policies.gdsf import GDSF
from kvstore.policies.lfu import LFU
from kvstore.policies.lru import LRU
from kvstore.policies.s3fifo import S3FIFO
from kvstore.policies.sieve import SIEVE


@runtime_checkable
class EvictionPolicy(Protocol):
    """The order in which blocks have to go, tail first: each only after the blocks built on it.

    So what is left of a chain is always its beginning, which is the part that a lookup can use
    (SGLang's radix cache, 2024, and vLLM's block pool, 2023, free leaves and tails first, too).
    Policies know names, parents, sizes and depths, do no I/O, and are not thread-safe.

    add: note a new block, with `depth` blocks before it in its chain; adding it again is a use.
    touch: note a use of a chain, given from its head on; unknown blocks are fine.
    remove: forget a block, but for what its return would tell; unknown ones are fine.
    victims: blocks in the order in which they may go, each a leaf once those before it are gone.
        One iterator at a time, and the policy must not change while it is in use. Take no more
        than have to go: some policies wipe marks or spend uses on the way. Whoever was taken and
        not removed comes again.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[bytes]: ...
    def __contains__(self, digest: bytes) -> bool: ...
    def add(self, digest: bytes, parent: bytes | None, nbytes: int, depth: int = 0) -> None: ...
    def touch(self, digests: Iterable[bytes]) -> None: ...
    def remove(self, digest: bytes) -> None: ...
    def nbytes(self, digest: bytes) -> int: ...
    def victims(self, pinned: Container[bytes]) -> Iterator[bytes]: ...


PolicyName: TypeAlias = Literal["lru", "fifo", "lfu", "arc", "s3fifo", "sieve", "gdsf"]
POLICIES: Mapping[PolicyName, Callable[[], EvictionPolicy]] = MappingProxyType(
    {
        "lru": LRU,
        "fifo": FIFO,
        "lfu": LFU,
        "arc": ARC,
        "s3fifo": S3FIFO,
        "sieve": SIEVE,
        "gdsf": GDSF,
    }
)
