"""Does the store hold what its books say, and only that?"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import lmdb

from kvstore.disk.entry import Entry
from kvstore.disk.ledger import Ledger
from kvstore.disk.loads import records
from kvstore.disk.tier import DiskTier
from kvstore.errors import CorruptRecord
from kvstore.tally import counted
from kvstore.tier import HostTier, Tier


@dataclass(slots=True)
class AuditReport:
    """What an audit has seen. `problems` are sentences; none means clean."""

    blocks: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def clean(self) -> bool:
        return not self.problems

    def __add__(self, other: "AuditReport") -> "AuditReport":
        return AuditReport(
            self.blocks + other.blocks,
            self.nbytes + other.nbytes,
            self.problems + other.problems,
            self.repaired or other.repaired,
        )


def audit_tier(tier: Tier, repair: bool) -> AuditReport:
    """Audit the tiers we know how to."""
    if isinstance(tier, DiskTier):
        return audit_disk(tier, repair)
    return audit_host(tier) if isinstance(tier, HostTier) else AuditReport()


def audit_host(tier: HostTier) -> AuditReport:
    residents = list(tier.residents())
    total = sum(resident.nbytes for resident in residents)
    problems = [f"host counts {tier.used_bytes} bytes and holds {total}"]
    return AuditReport(len(residents), total, problems if total != tier.used_bytes else [])


def audit_disk(tier: DiskTier, repair: bool) -> AuditReport:
    """Read and verify every record, then compare the books of one moment with each other.

    Bad blocks are quarantined at once; `repair` deletes them, and sets counts and free pages right.
    """
    with tier.access.reading() as txn:
        digests = _digests(tier.access.ledger, txn)
    problems = [problem for digest in digests if (problem := _check_block(tier, digest))]
    with tier.access.reading() as txn:
        good = list(tier.access.ledger.entries(txn))
        problems += _check_books(tier.access.ledger, txn, good)
    if repair and problems:
        _repair(tier)
    return AuditReport(len(good), sum(e.nbytes for e in good), problems, repair and bool(problems))


def _digests(ledger: Ledger, txn: lmdb.Transaction) -> list[bytes]:
    cursor = txn.cursor(ledger.env.entries)
    return [bytes(digest) for digest in cursor.iternext(keys=True, values=False)]


def _check_block(tier: DiskTier, digest: bytes) -> str | None:
    """What is wrong with one block, which is then quarantined."""
    try:
        records(tier.access, digest)  # None: evicted since
    except CorruptRecord as error:
        tier.access.quarantine(digest, str(error))
        return f"block {digest.hex()}: {error}"
    return None


def _check_books(ledger: Ledger, txn: lmdb.Transaction, good: list[Entry]) -> Iterator[str]:
    """Do entries, free pages and counters agree? All within one transaction."""
    known = {entry.key.digest for entry in good}
    children = Counter(entry.key.parent for entry in good)
    for entry in good:
        if entry.key.parent is not None and entry.key.parent not in known:
            yield f"block {entry.key.digest.hex()} is without its parent"
        if entry.children != children[entry.key.digest]:
            yield f"block {entry.key.digest.hex()} miscounts its children"
    yield from ledger.space.problems(txn, [entry.extent for entry in good])
    used, total = ledger.used(txn), sum(entry.nbytes for entry in good)
    if used != total:
        yield f"disk counts {used} bytes and holds {total}"
    if ledger.groups(txn) != counted((entry.group, entry.nbytes) for entry in good):
        yield "disk miscounts what belongs to whom"


def _repair(tier: DiskTier) -> None:
    with tier.access.changing() as txn:  # has deleted what is in quarantine
        good = list(tier.access.ledger.entries(txn))
        known = {entry.key.digest for entry in good}
        tier.access.ledger.remove_trees(
            txn, [e.key.digest for e in good if e.key.parent not in known | {None}]
        )
        digests = [entry.key.digest for entry in tier.access.ledger.entries(txn)]
        tier.access.ledger.recount(txn, digests)
