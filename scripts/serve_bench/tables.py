"""Results of the profiles as tables, for benchmarks/README.md."""

import statistics
from typing import Any

LINE = "| --- " * 9 + "|"


def mixed(record: dict[str, Any]) -> str:
    """What clients waited for, what was left, and where the time of requests went."""
    parts = [_about(record, f"arrivals of {record['arrivals']}"), "", *_load(record)]
    return "\n".join([*parts, "", *_spans(record["spans"])])


def long(record: dict[str, Any]) -> str:
    """The same, and what was read from disk meanwhile."""
    read = f"{record['spill_read_bytes'] / 2**20:.0f} MiB of keys and values were read from LMDB"
    lengths = f"prompts of {record['longest'] // 2:,} to {record['longest']:,} tokens"
    memory = f"method headrace, {lengths}, {record['pinned_mib']:.0f} MiB for KV"
    notes = f"- while decoding, **{read}**"
    return "\n".join([_about(record, memory), "", *_load(record), "", notes])


def interference(record: dict[str, Any]) -> str:
    """Time per token of streams, without and with long prompts."""
    rows = [
        "| prompts are read | long prompts | TPOT, p50 | p99 | gap, p50 | p99 | p99 ÷ without |"
    ]
    rows.append("| --- " * 7 + "|")
    for name, at in record["phases"].items():
        label = f"{record['step_tokens']} tokens a step" if name == "chunked" else "at once"
        for phase in ("without", "with"):
            x = at[phase]
            times = " | ".join(_ms(x[f"{p}_{of}_s"]) for of in ("tpot", "gap") for p in P)
            ratio = f"{at['ratio']:.2f} ×" if phase == "with" else ""
            rows.append(f"| {label} | {x['long_prompts']} | {times} | {ratio} |")
    about = (
        f"{record['clients']} streams at a time, and a prompt of {record['long_tokens']:,} tokens "
        "every few seconds; milliseconds per token of a\nrequest (TPOT) and from one token to the "
        "next (gap). `scripts/bench_serve.py interference`"
    )
    return "\n".join([about, "", *rows])


def shared(record: dict[str, Any]) -> str:
    """Tokens per second of both servers."""
    rows = ["| server | tokens/s | TTFT s, p50 | p99 | TPOT ms, p50 | p99 | prompt cached |"]
    rows.append("| --- " * 7 + "|")
    for name, rounds in record["rounds"].items():
        middle = {
            key: statistics.median(x[key] for x in rounds)
            for key in ("tokens_per_s", "p50_ttft_s", "p99_ttft_s", "p50_tpot_s", "p99_tpot_s")
        }
        cached = sum(x["cached_tokens"] for x in rounds) / sum(x["prompt_tokens"] for x in rounds)
        share = f"{cached:.0%}" if name == "headrace" else "not said"
        rows.append(
            f"| {name} | {middle['tokens_per_s']:.1f} | {middle['p50_ttft_s']:.1f} | "
            f"{middle['p99_ttft_s']:.1f} | {_ms(middle['p50_tpot_s'])} | "
            f"{_ms(middle['p99_tpot_s'])} | {share} |"
        )
    about = (
        f"{record['clients']} clients at once, {record['prefixes']} prefixes of "
        f"{record['prefix_tokens']:,} tokens among them, new ones in each of "
        f"{len(record['rounds']['headrace'])} rounds; {record['new_tokens']} tokens each.\n"
        f"`transformers serve --continuous-batching {record['theirs']}`".rstrip("` ")
        + "` on the same model, requests and threads. `scripts/bench_serve.py shared`"
    )
    return "\n".join([about, "", *rows, "", f"- **{record['ratio']:.2f} ×** their tokens/s"])


P = ("p50", "p99")


def _about(record: dict[str, Any], what: str) -> str:
    return (
        f"{record['clients']} clients for {record['seconds']:.0f} s, {what};\nsome hang up or "
        f"vanish. `scripts/bench_serve.py {record['benchmark'].removeprefix('serve_')}`"
    )


def _load(record: dict[str, Any]) -> list[str]:
    times = [record[f"{p}_{of}_s"] for of in ("ttft", "tpot") for p in P]
    cells = [
        f"{record['requests']} ({record['left']})",
        str(record["errors"]),
        f"{record['tokens_per_s']:.0f}",
        *(f"{x:.2f}" for x in times[:2]),
        *map(_ms, times[2:]),
        f"{record['rss_growth']:+.1%}",
        str(record["leaked_bytes"]),
    ]
    head = (
        "| requests (left by clients) | errors | tokens/s | TTFT s, p50 | p99 | TPOT ms, p50 | p99 "
        "| memory after | bytes leaked |"
    )
    return [head, LINE, f"| {' | '.join(cells)} |"]


def _spans(spans: dict[str, Any]) -> list[str]:
    """Shares of the wall time of all requests since the server's start, largest first."""
    shares = sorted(spans["shares"].items(), key=lambda pair: -pair[1])
    return [
        f"Spans cover {spans['coverage']:.1%} of the time of requests; they overlap, and a step "
        "that several share counts in each.",
        "",
        f"| {' | '.join(name for name, _ in shares)} |",
        "| --- " * len(shares) + "|",
        f"| {' | '.join(f'{share:.1%}' for _, share in shares)} |",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"
