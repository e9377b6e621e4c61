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


STORE_SUMMARY = (
    "hot_get_gbps", "hot_get_vs_pread", "cold_get_vs_odirect", "cold_get_vs_pread",
    "cold_inline_vs_odirect", "put_vs_files", "put_vs_inline",
    "hidden_512", "hidden_512_apart", "hidden_512_elsewhere", "hidden_512_elsewhere_apart",
    "hidden_64", "hidden_64_apart", "hidden_64_elsewhere", "hidden_64_elsewhere_apart",
)  # fmt: skip


def store(record: dict[str, Any]) -> str:
    """GB/s of the disk tier beside plain files and the raw disk."""
    rows = ["| GB/s | median | least | most |", "| --- | --- | --- | --- |"]
    for name, values in record["rounds"].items():
        middle = sorted(values)[len(values) // 2]
        rows.append(f"| {name} | {middle:.2f} | {min(values):.2f} | {max(values):.2f} |")
    summary = [f"- {name}: **{record[name]:.2f}**" for name in STORE_SUMMARY if name in record]
    about = (
        "The disk tier beside plain files and the raw disk: "
        f"{record['total_bytes'] / 2**20:.0f} MiB in values of {record['value_bytes'] / 2**20:.0f} "
        "MiB.\nA get ends in tensors, copied and verified; fresh means into memory that was never "
        "touched.\n1T, 2T, 4T: threads; raw: O_DIRECT reads of the payloads, and nothing else; "
        "inline: values in LMDB itself.\nhidden_N: share of the smaller of loading and "
        "computing, layer by layer, that the other hides, in blocks of N tokens; elsewhere: "
        "computing takes none of this processor's time;\napart: the two run beside each other, and "
        "neither waits for the other.\n"
        "`scripts/bench_store.py`"
    )
    return "\n".join([about, "", *rows, "", *summary])


def codecs(record: dict[str, Any]) -> str:
    """What each codec of stored KV saves, costs and spoils."""
    head = (
        "KV | codec | B/token | ratio | encode GB/s | decode | by threads | K % | V % | output % |"
    )
    rows = [f"| {head} worst layer % | KL | needles |", "|" + " --- |" * 13]
    for model, codecs in record["models"].items():
        for name, x in codecs.items():
            speeds = [x[f"{way}_gbps"] for way in ("encode", "decode", "decode_threads")]
            errors = ("key_error", "value_error", "output_error", "output_error_worst")
            cells = [
                f"{x['bytes_per_token']:.0f}",
                f"{x['ratio']:.2f}",
                *("" if gbps is None else f"{gbps:.2f}" for gbps in speeds),
                *(f"{100 * x[error]:.3f}" for error in errors),
                f"{x['kl']:.1e}",
                f"{record['needles'][name]} of {record['questions']}",
            ]
            rows.append(f"| {model} | {name} | {' | '.join(cells)} |")
    about = (
        f"KV of {record['tokens']} tokens of text in blocks of {record['block_tokens']}, by every "
        "codec of the store, and by 4 bits\nwithout smoothing at the bytes of `int4`. Output: of "
        f"attention for {record['behind']} tokens behind the text. Needles: by needle-tiny,\n"
        f"whatever the row's model. By threads: {record['decode_threads']} of them. "
        "`scripts/bench_codecs.py`"
    )
    return "\n".join([about, "", *rows])


def remote(record: dict[str, Any]) -> str:
    """GB/s through a server on the same machine."""
    speeds, over = record["gb_per_s"], record["over_redis_py"]
    rows = ["| | GB/s | over redis-py |", "| --- | --- | --- |"]
    for name, label in (
        ("put", "put, sealed"), ("get", "get, verified, into host memory"),
        ("get_without_host", "get, verified, without host memory"),
        ("redis_py_put", "redis-py SET"), ("redis_py_get", "redis-py GET"),
    ):  # fmt: skip
        rows.append(f"| {label} | {speeds[name]:.2f} | {over.get(name, '')} |")
    about = (
        f"{record['blocks']} blocks of {record['block_bytes'] >> 20} MiB, over a socket of the "
        f"machine; medians of {record['rounds']} rounds in turn. `scripts/bench_remote.py`"
    )
    return "\n".join([about, "", *rows])
