#!/usr/bin/env python3
"""Make the tables of benchmarks/README.md from the newest lines under benchmarks/results/.

scripts/bench_table.py            writes the file
scripts/bench_table.py --check    exits 1 where the file says something else
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faulting.table import faults
from serve_bench import tables as serve
from soaking.table import soak
from store_bench import tables as store_bench

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "benchmarks" / "README.md"
HEAD = """# Benchmarks

Made by `scripts/bench_table.py` from the newest lines under `results/`; every line there names its
commit, versions, device and shapes. Baseline and contender alternate in one run on the same inputs;
medians. Ratios carry over to other machines better than times do, and both move with whatever else
the machine does.

What no table shows was not measured; nothing was measured on a GPU yet.
"""


def decode(record: dict[str, Any]) -> str:
    """Tokens/s and memory of every contender at every length."""
    rows = [
        "| context | contender | tokens/s | ms, median | ms, p90 | peak MiB |",
        "|" + " --- |" * 6,
    ]
    for length, at in record["lengths"].items():
        for name, x in at["contenders"].items():
            mark = " (best of theirs)" if name == at["best"] else ""
            numbers = f"{x['tokens_per_s']:.2f} | {x['median_ms']:.1f} | {x['p90_ms']:.1f}"
            rows.append(f"| {length} | {name}{mark} | {numbers} | {x['peak_bytes'] / 2**20:.0f} |")
    ratios = [
        f"- {length} tokens: **{at['speedup']:.2f} ×** the best of theirs "
        f"(p10 {at['speedup_p10']:.2f}, p90 {at['speedup_p90']:.2f}); "
        f"peak memory {at['memory_ratio']:.3f} of theirs' least"
        for length, at in record["lengths"].items()
    ]
    about = (
        "Dense decode of one request against the caches and attentions of `transformers`, "
        f"{record['parameters'] / 1e6:.0f} M parameters\n"
        f"({record['model']['num_hidden_layers']} layers of Qwen3-0.6B, random), bf16, cache "
        "filled synthetically. `scripts/bench_decode.py`"
    )
    return "\n".join([about, "", *rows, "", *ratios])


def prefill(record: dict[str, Any]) -> str:
    """Seconds of every contender at every length."""
    rows = ["| tokens | contender | s, median | s, p90 | tokens/s |", "|" + " --- |" * 5]
    for length, at in record["lengths"].items():
        for name, x in at["contenders"].items():
            mark = " (best of theirs)" if name == at["best"] else ""
            speed = f"{int(length) / x['median_s']:.0f}"
            numbers = f"{x['median_s']:.2f} | {x['p90_s']:.2f} | {speed}"
            rows.append(f"| {length} | {name}{mark} | {numbers} |")
    ratios = [
        f"- {length} tokens: **{at['speedup']:.2f} ×** as fast as the best of theirs"
        for length, at in record["lengths"].items()
    ]
    about = (
        "A prompt read into a new cache, against `transformers` with SDPA: at once, and in chunks "
        f"of {record['chunk']} tokens\nas here; {record['parameters'] / 1e6:.0f} M parameters, as "
        "in the table above, bf16. `scripts/bench_prefill.py`"
    )
    return "\n".join([about, "", *rows, "", *ratios])


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


def sparse_decode(record: dict[str, Any]) -> str:
    """Time of one sparse layer beside dense ones."""
    rows = ["| context | contender | ms, median | ms, p90 |", "|" + " --- |" * 4]
    notes = []
    for length, at in record["lengths"].items():
        for name, ms in at["ms"].items():
            mark = " (fastest dense of torch)" if name == at["best_dense"] else ""
            rows.append(f"| {length} | {name}{mark} | {ms:.2f} | {at['p90_ms'][name]:.2f} |")
        notes.append(
            f"- {length} tokens: **{at['speedup']:.1f} ×** the fastest dense of torch, "
            f"{at['speedup_over_own_dense']:.1f} × our own; what is selected holds "
            f"{at['mass']:.3f} of the attention, {at['of_oracle']:.3f} of the most possible"
        )
    about = (
        f"One layer, 32 query and 8 KV heads of 128, bf16, a budget of {record['budget']} tokens, "
        "evidence scattered over\nthe context: score, select, gather and attend with the default "
        "method, against dense attention.\n`scripts/bench_sparse_decode.py`"
    )
    return "\n".join([about, "", *rows, "", *notes])


def end_to_end(record: dict[str, Any]) -> str:
    """Tokens/s of whole models."""
    found = record["result"]
    rows = ["| contender | tokens/s | hits | of a guess | MiB fetched | ms waited |"]
    rows.append("|" + " --- |" * 6)
    for name, rate in found["tokens_per_s"].items():
        stats, rest = found["stats"].get(name), " | | | "
        if stats is not None and "device" in name:
            rest = f"{stats['hit_share']:.2f} | {stats['guessed_share']:.2f} | "
            rest += f"{stats['fetched_mib_per_step']:.1f} | {stats['waited_ms_per_step']:.1f}"
        label = "headrace, dense" if name == "headrace" else name
        rows.append(f"| {label} | {rate:.1f} | {rest} |")
    about = (
        f"Decode at {record['tokens']} tokens, the model and KV of the dense bench, budget 2,048. "
        "Hits, fetches and waits are a step's,\nwhere rows go to a buffer on the device; here "
        "that is the same memory, so the buffer only costs.\n`scripts/bench_end_to_end.py`"
    )
    ratio = (
        f"- **{found['speedup_over_theirs']:.2f} ×** the best of transformers "
        f"({found['best_of_theirs']}), {found['speedup_over_own_dense']:.2f} × our own dense decode"
    )
    return "\n".join([about, "", *rows, "", ratio])


def memory(record: dict[str, Any]) -> str:
    """Bytes on the device and in the host's pool."""
    rows = ["| method | device MiB | share of the KV | pool MiB | peak RSS ÷ granted |"]
    rows.append("|" + " --- |" * 5)
    for name, at in record["cases"].items():
        sizes = f"{at['device_bytes'] / 2**20:.0f} | 1/{1 / at['device_share']:.1f}"
        pool = f"{at['pool_bytes'] / 2**20:.0f} | {at['peak_over_granted']:.2f}"
        rows.append(f"| {name} | {sizes} | {pool} |")
    about = (
        f"A context of {record['tokens']} tokens, 2 layers of 8 KV heads of 128, bf16 (1,024 MiB "
        "of KV): what stands in for it\non the device, hot buffer included. Granted: the process "
        "before, the pool, these bytes, and one and a half layers'\nKV while a prompt is taken "
        "in. `scripts/bench_memory.py`"
    )
    return "\n".join([about, "", *rows])


INPUTS = ("real", "clustered", "scattered", "flat", "sink", "drift")


def indexes(record: dict[str, Any]) -> str:
    """Attention mass that indexes find, at equal bytes and equal tokens."""
    rows = [f"| index | B/token | {' | '.join(INPUTS)} |", "|" + " --- |" * (2 + len(INPUTS))]
    for name, row in record["summary"].items():
        if name != "default":
            mark = "**" if name == record["summary"]["default"] else ""
            masses = " | ".join(f"{row[x]:.3f}" for x in INPUTS)
            rows.append(f"| {mark}{name}{mark} | {row['bytes_per_token']:g} | {masses} |")
    about = (
        "Attention mass of what is selected over that of the best selection, 2 % of the tokens, "
        f"{record['seeds']} seeds of planted\nevidence in {record['tokens']} tokens, and real "
        "text through both needle models. Bytes are a token's and KV head's.\n"
        "`scripts/bench_indexes.py`"
    )
    return "\n".join([about, "", *rows, "", "![mass by bytes](indexes.png)"])


def needles(record: dict[str, Any]) -> str:
    """Answers right, by method and budget."""
    parts = []
    for model, at in record["models"].items():
        cells = {(c["method"], c["budget"]): c for c in at["cells"]}
        dense = cells.pop(("dense", 1.0))
        budgets = list(dict.fromkeys(budget for _, budget in cells))
        rows = [f"| {model} | {' | '.join(f'{b:.1%}' for b in budgets)} |"]
        rows.append("|" + " --- |" * (1 + len(budgets)))
        for method in dict.fromkeys(name for name, _ in cells):
            mine = [cells[method, b] for b in budgets]
            shares = (f"{c['right'] / c['asked']:.2f} ({c['attended']:.0f})" for c in mine)
            rows.append(f"| {method} | {' | '.join(shares)} |")
        share = f"dense: {dense['right'] / dense['asked']:.2f} of {dense['asked']} questions"
        rank = f"; rank of shadowkv and lowrank+scalar+int4: {at['rank']} of 128"
        parts.append("\n".join([*rows, "", share + rank]))
    about = (
        "Share of answers right (tokens attended to per KV head): "
        f"{at['needles']} needles in {at['tokens']:,} tokens of "
        "real text, read densely,\nquestions and answers decoded sparsely, sinks (4) and window "
        f"(16) inside the budget. `scripts/bench_needles.py{' --long' * (at['tokens'] > 4096)}`"
    )
    if "tail" not in record:  # older records
        about += " `headrace` is without the estimate of the tail here, which it has had since."
    return "\n\n".join([about, *parts])


def kvpress(record: dict[str, Any]) -> str:
    """Answers right after eviction."""
    rows = []
    for model, presses in record["summary"].items():
        shares = list(next(iter(presses.values())))
        rows += [f"| {model} | {' | '.join(f'{float(x):.0%}' for x in shares)} |"]
        rows += ["|" + " --- |" * (1 + len(shares))]
        rows += [f"| {name} | {' | '.join(map(str, x.values()))} |" for name, x in presses.items()]
        rows += [""]
    about = (
        f"The same texts and {record['questions']} questions through kvpress {record['kvpress']}, "
        "which evicts before it knows the questions:\nshare of answers right, by the share of the "
        "KV that is kept. `scripts/bench_kvpress.py`"
    )
    return "\n".join([about, "", *rows]).rstrip()


def blend(record: dict[str, Any]) -> str:
    """Seconds to the first token by policy, and what the controller chose."""
    rows = ["| | s, median | p90 | × the faster full prefill | charged |", "|" + " --- |" * 5]
    for column, at in record["seconds"].items():
        for name, values in at.items():
            middle, most = quantile(values, 0.5), quantile(values, 0.9)
            charged = record["charged"].get(name)
            share = "" if charged is None else f"{charged:.1%}"
            faster = f"{record['baseline_s'] / middle:.2f}"
            rows.append(f"| {column}, {name} | {middle:.3f} | {most:.3f} | {faster} | {share} |")
    notes = []
    for times, at in record["controller"].items():
        fixed = {name: value for name, value in at.items() if name != "controller"}
        best = min(fixed, key=lambda name: fixed[name])
        notes.append(
            f"- controller, loading {times} × as fast as a full prefill: {at['controller']:.2f} s, "
            f"**{at['controller'] / fixed[best]:.2f}** of the best fixed choice ({best})"
        )
    about = (
        f"Time to the first token of {record['chunks']} chunks of {record['chunk_tokens']} tokens "
        f"in a new order, loading included: a random Llama of\n"
        f"{record['model']['num_hidden_layers']} layers, bf16, {record['threads']} threads; "
        f"policies at {record['share']:.0%} charged, or the least they reach. Host: KV in memory; "
        "cold: on LMDB,\npages dropped. `scripts/bench_blend.py`"
    )
    return "\n".join([about, "", *rows, "", *notes]).rstrip()


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def blend_quality(record: dict[str, Any]) -> str:
    """KL and right answers by policy and charged share."""
    about = (
        f"Ten chunks that were cached one by one, read by `models/{record['model']}`; "
        f"{record['samples']} prompts of each kind.\nKL of the answer's first token to that after "
        "a full prefill, in nats, and share of right answers (in parentheses).\nA share that a "
        "policy cannot spend, or must exceed, is empty. `scripts/bench_blend_quality.py`"
    )
    tables = [_quality(name.replace("_", " "), at) for name, at in record["inputs"].items()]
    return "\n\n".join([about, "![KL by charged share](blend_quality.png)", *tables])


def _quality(title: str, found: dict[str, Any]) -> str:
    shares = sorted({s for points in found["rows"].values() for s in points}, key=float)
    rows = [f"| {title} | {' | '.join(shares)} |", "|" + " --- |" * (len(shares) + 1)]
    for policy, points in found["rows"].items():
        cells = [_point(points[s]) if s in points else "" for s in shares]
        rows.append(f"| {policy} | {' | '.join(cells)} |")
    if full := found.get("full"):
        rows += ["", f"Full prefill: {full['right']:.2f} right."]
    return "\n".join(rows)


def _point(point: dict[str, float]) -> str:
    right = f" ({point['right']:.2f})" if "right" in point else ""
    return f"{point['kl']:.4f}{right}"


def aot(record: dict[str, Any]) -> str:
    """Registers and spills of every kernel, by generation."""
    about = (
        f"Compiled by Triton {record['triton']} for sm_80, sm_90 and sm_100, not run: registers of "
        "a thread, bytes of shared memory\nof a program on sm_90, bytes spilled. "
        "`scripts/bench_aot.py`"
    )
    rows = ["| kernel | registers 80 / 90 / 100 | shared | spilled |", "|" + " --- |" * 4]
    for name, made in record["builds"].items():
        each = [made[f"sm_{arch}"] for arch in (80, 90, 100)]
        registers = " / ".join(str(x["registers"]) for x in each)
        spilled = [x["spill_bytes"] for x in each]
        shown = " / ".join(map(str, spilled)) if any(spilled) else "0"
        label, shared = name.replace("|", "/"), each[1]["shared_bytes"]  # a bar ends a cell
        rows.append(f"| {label} | {registers} | {shared} | {shown} |")
    return "\n".join([about, "", *rows])


def packed(record: dict[str, Any]) -> str:
    """Seconds of prompts packed, one by one, and padded, by batch."""
    rows = ["| prompts | contender | tokens computed | s, median | packed is |", "|" + " --- |" * 5]
    for batch, at in record["batches"].items():
        for name, seconds in at["median_s"].items():
            tokens = at["tokens" if name in ("packed", "separate") else "padded_tokens"]
            times = "" if name == "packed" else f"{at['over'][name]:.2f} ×"
            rows.append(f"| {batch} | {name} | {tokens} | {seconds:.2f} | {times} |")
    shares = [
        f"- {batch} prompts: {at['token_share']:.3f} of padded's tokens in "
        f"{at['time_share']:.3f} of its time, efficiency **{at['efficiency']:.2f}**"
        for batch, at in record["batches"].items()
    ]
    about = (
        f"Prompts as long as in Azure's conversation trace, times {record['scale']}, in steps of "
        f"{record['step_tokens']} tokens, {record['threads']} threads. `scripts/bench_packed.py`"
    )
    return "\n".join([about, "", *rows, "", *shares])


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


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode": decode,
    "prefill": prefill,
    "store": store,
    "remote": remote,
    "store_lmcache": store_bench.beside_lmcache,
    "codecs": codecs,
    "sparse_decode": sparse_decode,
    "end_to_end": end_to_end,
    "indexes": indexes,
    "needles": needles,
    "needles_long": needles,
    "kvpress": kvpress,
    "memory": memory,
    "blend": blend,
    "blend_quality": blend_quality,
    "aot": aot,
    "packed": packed,
    "serve_mixed": serve.mixed,
    "serve_long": serve.long,
    "serve_interference": serve.interference,
    "serve_shared": serve.shared,
    "faults": faults,
    "soak": soak,
}
TITLES = {
    "remote": "Shared tier over Redis",
    "store_lmcache": "Store beside LMCache",
    "aot": "Kernels, compiled ahead of time",
    "codecs": "Codecs of stored KV",
    "packed": "Packed prompts",
    "serve_mixed": "Server under load",
    "serve_long": "Server with long prompts",
    "serve_interference": "Server: streams while prompts are read",
    "serve_shared": "Server beside transformers serve",
    "faults": "Faults put into stores",
    "soak": "A store at its budget",
}


def page() -> str:
    """The whole file."""
    parts = [HEAD]
    for name, table in PARTS.items():
        if (record := newest(name)) is None:
            continue
        versions = ", ".join(
            f"{k} {record[k]}" for k in ("torch", "transformers", "lmdb") if k in record
        )
        where = f"{record['device']}, {' '.join(record.get('flags', []))}".rstrip(", ")
        source = f"{where}; {versions}; commit {record['commit'][:8]}; {record['date'][:10]}"
        title = TITLES.get(name, name.replace("_", " ").capitalize())
        parts.append(f"## {title}\n\n{table(record)}\n\n{source}\n")
    return "\n".join(parts)


def newest(name: str) -> dict[str, Any] | None:
    """The last line of the last results file of a benchmark; None where it was not run."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"{name}_[0-9]*.json*"))
    return json.loads(files[-1].read_text().splitlines()[-1]) if files else None


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text() != page())
    TARGET.write_text(page())
