"""What can go wrong in the store.

StoreError                  the store could not do what was asked
├── StoreFormatError        the folder holds something else than a store of this version
├── CorruptRecord           bytes that are not what was asked for; callers of the store see a miss
├── MissingParent           a block would rest on disk without the blocks before it
├── PoolFull                a pool's byte budget does not suffice for the requests that run
├── Unreachable             the shared tier does not answer as it should; callers see a miss
│   └── TimedOut            it does not answer in time
└── TierFull                a tier's byte budget does not suffice
    └── DeviceFull          the device below the tier is full, whatever the budget says
"""


class StoreError(Exception):
    """The store could not do what was asked; what it held before is unchanged."""


class StoreFormatError(StoreError):
    """The folder is no store, or one of another format version."""


class CorruptRecord(StoreError):
    """A record that cannot be trusted. Inside the store it becomes a miss."""


class MissingParent(StoreError):
    """A block's parent is not in the tier, so no lookup could ever reach the block."""


class PoolFull(StoreError):
    """A pool has no room for more tokens; requests that end make some."""


class Unreachable(StoreError):
    """The server of the shared tier cannot be asked. Inside the store it becomes a miss."""


class TimedOut(Unreachable):
    """It took longer than remote.timeout_s or remote.connect_timeout_s."""


class TierFull(StoreError):
    """The blocks do not fit into the tier's budget, even after evicting all that may go."""


class DeviceFull(TierFull):
    """No space is left on the device that holds the tier."""
