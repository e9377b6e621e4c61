"""The seam to whatever machines share: named values of bytes, of which none is trusted."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from kvstore.remote.wire import Buffer


@runtime_checkable
class RemoteBackend(Protocol):
    """Values by name, somewhere else. Thread-safe. Nothing here knows what is in them.

    Every call ends in the time-outs of the backend, or raises Unreachable; TimedOut if it waited.
    Names that belong together have the same part in braces, and lie in one place.

    exists_many: which of the names are there.
    get_many: how many bytes of each value are now in the buffer of the same number; 0 if absent.
        No more come than a buffer holds, so one that is full may be the start of a longer value.
    put_many: which values are there afterwards; a server that is full refuses some.
    delete: of names that belong together; unknown ones are fine.
    resolve: find the server anew. May wait for long, e.g. for a name server.
    """

    def exists_many(self, names: Sequence[bytes]) -> list[bool]: ...
    def get_many(self, names: Sequence[bytes], into: Sequence[memoryview]) -> list[int]: ...
    def put_many(self, values: Sequence[tuple[bytes, Buffer]]) -> list[bool]: ...
    def delete(self, names: Sequence[bytes]) -> None: ...
    def resolve(self) -> None: ...
    def close(self) -> None: ...
    def __str__(self) -> str: ...
