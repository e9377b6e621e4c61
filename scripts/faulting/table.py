"""What came of the campaigns as a table, for benchmarks/README.md."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Campaign(NamedTuple):
    """Of the modules under tests/kvstore/faults."""

    rounds: int  # at scale 1; of kill_phases in each phase, of power_cuts on each of two disks
    about: str


# the longest first
CAMPAIGNS = {
    "flips": Campaign(100_000, "bytes of both files changed, a tenth of them LMDB's own"),
    "kill_phases": Campaign(100, "SIGKILL in every phase of a change, compaction, import, opening"),
    "broken_io": Campaign(1500, "EIO, ENOSPC, half a write, half and SIGKILL, at any call"),
    "kill_outside": Campaign(1000, "SIGKILL from outside, at random moments"),
    "power_cuts": Campaign(500, "power cuts, of disks that are honest and that lie"),
    "cuts": Campaign(300, "data.mdb or the values cut while they are read and written"),
    "two_writers": Campaign(300, "two processes put, evict and delete in one folder"),
    "overtaken": Campaign(300, "pages of blocks used again while these are read"),
    "removed": Campaign(300, "folder or a file deleted, moved, cut, read-only while it is used"),
    "readers_killed": Campaign(100, "SIGKILL of a reader in a transaction"),
    "clocks": Campaign(100, "the clock jumps by years"),
    "remote_kill": Campaign(100, "shared tier: SIGKILL of a sender"),
    "remote_tampering": Campaign(10_000, "shared tier: bits of values changed on the server"),
}
BAD = ("wrong", "lost", "stalled", "failed")


def faults(record: dict[str, Any]) -> str:
    """Counts of each campaign, and what flips of bytes without a checksum did."""
    rows = ["| | rounds | wrong KV | lost | stalled | other failures | peak MiB |"]
    rows.append("|" + " --- |" * 7)
    for name, found in record["campaigns"].items():
        cells = [f"{found['rounds']:,}", *(str(found[bad]) for bad in BAD)]
        peak = f"{found['most_bytes'] / 2**20:.0f}" if found["most_bytes"] else ""
        rows.append(f"| {CAMPAIGNS[name].about} | {' | '.join(cells)} | {peak} |")
    about = (
        "Faults put into stores, and what was then served that had not been written (wrong KV), or "
        "not served although it\nhad been acknowledged (lost). Other failures: ends of processes "
        "and findings of audits that are not allowed.\nMemory is resident, of one process with "
        "torch. `scripts/faults`"
    )
    notes = []
    if (flips := record["campaigns"].get("flips")) is not None:
        notes = ["", *_tables(flips["outcomes"])]
    return "\n".join([about, "", *rows, *notes])


def _tables(outcomes: Mapping[str, int]) -> list[str]:
    """Of flips in LMDB's own pages."""
    kinds = dict.fromkeys(name.split(":")[0] for name in outcomes if ": " in name)
    lines = []
    for kind in kinds:
        said = [
            f"{n:,} {name.split(': ')[1]}" for name, n in outcomes.items() if kind + ":" in name
        ]
        lines.append(f"- {kind}: {', '.join(sorted(said))}")
    return lines
