"""Tables of benchmarks/README.md."""

import statistics
from typing import Any

ROWS = {
    "host_put_1": "put to host memory, the first round",
    "host_put": "put to host memory that is full",
    "host_get": "get from host memory",
    "disk_put": "put to disk, durable on both sides",
    "disk_put_unsynced": "put to disk, as each ships (theirs: page cache)",
    "disk_get": "get from disk, cold",
    "disk_get_hot": "get from disk, in the page cache",
}


def beside_lmcache(record: dict[str, Any]) -> str:
    """GB/s of both sides, and ours over theirs."""
    rows = ["| GB/s, median | ours | LMCache | ours / LMCache |", "|" + " --- |" * 4]
    for name, what in ROWS.items():
        ours, theirs = (statistics.median(record["rounds"][name][x]) for x in ("ours", "lmcache"))
        rows.append(f"| {what} | {ours:.2f} | {theirs:.2f} | **{record['ratios'][name]:.2f}** |")
    about = (
        f"Host memory and disk beside the backends of LMCache {record['theirs']['lmcache']}, "
        f"without a GPU: {record['total_bytes'] / 2**20:.0f} MiB,\nthe same bytes, in turn. Ours "
        "writes checksums, and verifies what comes from disk; theirs has none. Both find their\n"
        "memory touched, but for the first put: LMCache touches all of its budget when it starts, "
        "the store as it fills.\nWhat each round does: `scripts/store_bench/beside_lmcache.py`. "
        "`scripts/bench_store.py --lmcache`"
    )
    return "\n".join([about, "", *rows])
