"""`headrace trace`: where the time of a server's last requests went."""

import http.client
import json
import sys
import time
import urllib.error
import urllib.parse
from argparse import Namespace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.commands.asking import KEY_VARIABLE, said
from engine.errors import ConfigError, EngineError
from engine.serve.report import SpanReport, TraceReport, TracesReport

TIMEOUT_S = 30.0
COLUMNS = 44  # of a waterfall
COLOURS = {
    "http": "bright_black", "tokenise": "bright_black", "queue": "yellow", "lookup": "green",
    "load": "green", "swap": "red", "prefill": "blue", "blend": "magenta", "decode": "cyan",
    "sample": "magenta", "detokenise": "bright_black", "send": "bright_black",
}  # fmt: skip


def run(args: Namespace) -> int:
    if args.otlp is not None:
        return _export(args)
    answer = _ask(args)
    try:
        traces = msgspec.json.decode(answer, type=TracesReport).traces
    except msgspec.DecodeError as error:
        raise EngineError(f"{args.url} does not answer as headrace does: {error}") from error
    _refuse_none(args, len(traces))
    if args.json:
        print(json.dumps(json.loads(answer)))
    elif args.id is None:
        _console().print(_list(traces))
    else:
        for trace in traces:
            _show(_console(), trace)
    return 0


def _export(args: Namespace) -> int:
    """OTLP/JSON, as it came, in a file or on stdout."""
    answer = _ask(args, format="otlp")
    try:
        scopes = [s for r in json.loads(answer)["resourceSpans"] for s in r["scopeSpans"]]
        count = sum(len(scope["spans"]) for scope in scopes)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{args.url} does not answer as headrace does: {error}") from error
    _refuse_none(args, count)
    if args.otlp == "-":
        print(answer.decode())
    else:
        Path(args.otlp).write_bytes(answer + b"\n")
    return 0


def _ask(args: Namespace, **query: str) -> bytes:
    """The body of `/traces`."""
    if args.id is not None:
        query["id"] = args.id
    try:
        page = f"traces?{urllib.parse.urlencode(query, errors='surrogateescape')}"
        return said(args.url, page, args.key, TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 401:
                raise ConfigError(
                    f"{args.url} needs a key that it knows: give one with --key, or in "
                    f"${KEY_VARIABLE}"
                ) from error
            raise EngineError(f"{args.url} answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise EngineError(
            f"no server at {args.url} ({reason}): start one with headrace serve, or give --url"
        ) from error


def _refuse_none(args: Namespace, found: int) -> None:
    if args.id is not None and not found:
        raise EngineError(f"the server knows no request {args.id}: it remembers the last ones only")


def _console() -> Console:
    """Of results: as wide as the terminal, and wide enough for tables where there is none."""
    width = None if sys.stdout.isatty() else 160
    return Console(file=sys.stdout, highlight=False, markup=False, width=width)


def _list(traces: list[TraceReport]) -> Table:
    table = Table(box=None, header_style="bright_black", pad_edge=False)
    for name in ("id", "at", "request"):
        table.add_column(name, no_wrap=True)
    for name in ("status", "prompt", "stored", "answer", "took", "covered"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most of it", no_wrap=True)
    for trace in traces:
        said = trace.attributes
        numbers = [said.get(n) for n in ("prompt_tokens", "cached_tokens", "new_tokens")]
        table.add_row(
            trace.id[:16],
            time.strftime("%H:%M:%S", time.localtime(trace.started_at)),
            trace.name,
            str(said.get("status", "")),
            *("" if number is None else f"{number:,}" for number in numbers),
            _seconds(trace.wall_s),
            f"{trace.coverage:.1%}",
            _shares(trace.shares),
        )
    return table


def _shares(shares: dict[str, float]) -> Text:
    """The largest first; the others are small, and seen in a waterfall."""
    text = Text()
    for name, share in sorted(shares.items(), key=lambda item: -item[1])[:4]:
        if share >= 0.01:
            text.append(f"{name} {share:.0%}  ", COLOURS.get(name, ""))
    return text


def _show(console: Console, trace: TraceReport) -> None:
    """One request as a waterfall."""
    console.print(Text(f"{trace.name}  {trace.id}", "bold"))
    said = [f"{name} {value}" for name, value in trace.attributes.items() if value != ""]
    console.print(Text(", ".join(said), "bright_black"))
    table = Table(box=None, header_style="bright_black", pad_edge=False)
    table.add_column("span", no_wrap=True)
    table.add_column(f"0 to {_seconds(trace.wall_s)}", width=COLUMNS, no_wrap=True)
    for name in ("from", "took", "busy", "share", "times"):
        table.add_column(name, justify="right", no_wrap=True)
    for span in trace.spans:
        table.add_row(
            span.name,
            Text(_bar(span, trace.wall_s), COLOURS.get(span.name, "")),
            _seconds(span.start_s),
            _seconds(span.end_s - span.start_s),
            _seconds(span.busy_s),
            f"{span.busy_s / trace.wall_s:.1%}",
            f"{span.count:,}",
        )
    console.print(table)
    console.print(Text(f"spans cover {trace.coverage:.1%} of {_seconds(trace.wall_s)}\n"))


def _bar(span: SpanReport, wall_s: float) -> str:
    """Where it lies in the request, in columns; what took no time is a thin line."""
    start = min(COLUMNS - 1, int(span.start_s / wall_s * COLUMNS))
    end = min(COLUMNS, round(span.end_s / wall_s * COLUMNS))
    return " " * start + ("█" * (end - start) if end > start else "▏")


def _seconds(seconds: float) -> str:
    if seconds < 1e-4:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
