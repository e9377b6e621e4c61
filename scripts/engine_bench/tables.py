"""Tables of what the engine's loops took, beside what users could take instead."""

from typing import Any


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
    option = "" if record["dtype"] == "bfloat16" else f" --dtype {record['dtype']}"
    about = (
        "A prompt read into a new cache, against `transformers` with SDPA: at once, and in chunks "
        f"of {record['chunk']} tokens\nas here; {record['parameters'] / 1e6:.0f} M parameters, as "
        f"decoded with above, {record['dtype']}. `scripts/bench_prefill.py{option}`"
    )
    return "\n".join([about, "", *rows, "", *ratios])


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
