"""What a user may set about the store."""

import re

import msgspec

from kvstore.admission import AdmissionName
from kvstore.block import Precision
from kvstore.codecs.known import BY_NAME, CodecName
from kvstore.eviction import PolicyName
from kvstore.names import no_folder, wrong_name
from kvstore.quotas import Quotas
from kvstore.remote.config import RemoteConfig

GIB = 1 << 30


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets of the tiers, and where the disk tier lives.

    Args:
        host_bytes: memory for blocks; 0 for no host tier.
        disk_path: folder of the disk tier; None for no disk tier. Not on a network file system.
        disk_bytes: live bytes on disk. The file may be some batches larger (see DiskTier).
        disk_write_bytes_per_s: KV written to the disk per second, over time, so that an SSD lasts;
            what does not fit the queue then is not stored there. None for no limit.
        codec: how blocks are written to the disk and to `remote`. `raw`; `lossless`, for about two
            thirds of the bytes; or with an error, which names of blocks tell, so that a request for
            exact KV never gets them: `fp8`, `int8` (half the bytes), `k8v4` (0.42), `int4` (0.31).
            Exact blocks are then written by `lossless`.
        policy: which blocks of a full tier go first, the last of their chain always: `lru`, least
            recently used; `fifo`, `lfu`, `arc`, `s3fifo`, `sieve`, `gdsf`. See `kvstore.policies`.
        remote: a server that machines share blocks through, behind all other tiers; None for none.
        admission: what comes to the disk: `always` all; `second-sight` all while there is room, and
            then what is seen again. See `kvstore.admission`. To memory all comes.
        tenant_quota_bytes: of each tenant, on disk, and the same part of the budget in memory (of
            that budget where there is no disk tier); None for no limit. See `kvstore.quotas`.
        tenant_quotas: of some tenants, by their tags, as `headrace store stat` shows them.
    Raises:
        ValueError: if a budget is negative or no tier is left.
    """

    host_bytes: int = GIB
    disk_path: str | None = None
    disk_bytes: int = 16 * GIB
    disk_write_bytes_per_s: int | None = None
    codec: CodecName = "raw"
    policy: PolicyName = "lru"
    remote: RemoteConfig | None = None
    admission: AdmissionName = "always"
    tenant_quota_bytes: int | None = None
    tenant_quotas: dict[str, int] = {}

    @property
    def precision(self) -> Precision:
        """Of KV where nothing more exact is asked for."""
        return BY_NAME[self.codec].precision

    def __post_init__(self) -> None:
        if self.host_bytes < 0:
            raise ValueError(f"host_bytes must be 0 (no host tier) or more, got {self.host_bytes}")
        if self.disk_bytes <= 0:
            raise ValueError(f"disk_bytes must be positive, got {self.disk_bytes}")
        if self.disk_write_bytes_per_s is not None and self.disk_write_bytes_per_s <= 0:
            raise ValueError(
                "disk_write_bytes_per_s must be positive, or left out for no limit, got "
                f"{self.disk_write_bytes_per_s}"
            )
        if self.disk_path is not None and no_folder(self.disk_path):
            raise ValueError(
                f"disk_path must name a folder, got {self.disk_path!r}; leave it out for no disk "
                "tier"
            )
        if (said := wrong_name(self)) is not None:
            raise ValueError(said)
        for quota in (self.tenant_quota_bytes, *self.tenant_quotas.values()):
            if quota is not None and quota <= 0:
                raise ValueError(f"a tenant's quota must be positive, got {quota}")
        for tag in self.tenant_quotas:
            if not re.fullmatch("[0-9a-f]{16}", tag):
                raise ValueError(
                    "tenant_quotas names tenants by 16 hexadecimal digits, as headrace store stat "
                    f"shows them, got {tag!r}"
                )
        if self.host_bytes == 0 and self.disk_path is None:
            raise ValueError("the store has no tier: set disk_path, or host_bytes above 0")

    def quotas(self) -> Quotas:
        """Of the largest tier; see `kvstore.quotas`."""
        own = {bytes.fromhex(tag): nbytes for tag, nbytes in self.tenant_quotas.items()}
        whole = self.host_bytes if self.disk_path is None else self.disk_bytes
        return Quotas(self.tenant_quota_bytes, own, whole=whole)
