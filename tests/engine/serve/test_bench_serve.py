"""The load test: its client sees what is wrong, its judge too, and its profiles still run."""

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.serve.server import LIMIT_S, ROOT, running

SCRIPT = ROOT / "scripts" / "bench_serve.py"
CONTRACT = {"clients", "requests", "errors", "p99_ttft_s", "p99_tpot_s", "rss_growth"}
CONTRACT |= {"leaked_bytes"}
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = {"model": "needle-tiny", "prompt": "a", "max_tokens": 12, "temperature": 0}
BODY |= {"stream_options": {"include_usage": True}}


@pytest.fixture
def bench(monkeypatch):
    """Modules of the script, by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: importlib.import_module(f"serve_bench.{name}")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str = "", finish: str | None = None, usage: dict | None = None) -> bytes:
    choices = [] if usage else [{"text": text, "index": 0, "finish_reason": finish}]
    return chunk(b"data: %s\n\n" % json.dumps({"choices": choices, "usage": usage}).encode())


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
WHOLE = HEAD + event("a") + event("b", "stop") + event(usage=USAGE) + chunk(b"data: [DONE]\n\n")
END = b"0\r\n\r\n"


@asynccontextmanager
async def saying(said: bytes, heard: list[bytes] | None = None):
    """The port of a server that reads a request, says this, and hangs up."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        if heard is not None:
            heard.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def reply_to(bench, said: bytes, **options):
    async def ask():
        async with saying(said) as port:
            return await bench("client").complete(port, BODY, timeout_s=LIMIT_S, **options)

    return asyncio.run(ask())


def test_a_good_stream_is_counted(bench):
    reply = reply_to(bench, WHOLE + END)
    assert reply.error is None
    assert (reply.text, reply.new_tokens, reply.prompt_tokens) == (["a", "b"], 2, 9)
    assert (reply.cached_tokens, reply.finish) == (4, "stop")
    assert 0 < reply.ttft_s <= reply.times[1] < reply.total_s
    assert reply.tpot_s == reply.gaps_s[0]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", "status 503: later"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "transfer-encoding"),
        (b"", "IncompleteReadError"),
        (WHOLE, "cut off"),
        (HEAD + event("a") + END, "without a finish_reason"),
        (HEAD + event("a", "stop") + END, "usage 0 tokens"),
        (HEAD + event("a") * 3 + event("", "stop") + event(usage=USAGE) + END, "3 events"),
        (HEAD + chunk(b'data: {"error": {"message": "x"}}\n\n') + END, "error in the stream"),
        (HEAD + chunk(b"data: {") + END, "middle of a line"),
        (HEAD + chunk(b"nothing\n") + END, "not an event"),
        (HEAD + chunk(b"data: {\n\n") + END, "DecodeError"),
    ],
)
def test_what_is_wrong_with_a_stream_is_an_error(bench, said, words):
    assert words in reply_to(bench, said).error


def test_a_server_that_says_nothing_is_an_error_in_time(bench):
    async def ask():
        async with saying(b"", heard=[]) as port:
            return await bench("client").complete(port, BODY, timeout_s=0.1)

    assert asyncio.run(ask()).error == "no end after 0.1 s"


@pytest.mark.parametrize("leave", ["close", "reset"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_client_that_goes_away_is_no_error_and_costs_nothing(bench, leave, after):
    with running() as server:
        body = BODY | {"max_tokens": 3000}
        options = {"leave_after": after, "leave": leave, "timeout_s": LIMIT_S}
        reply = asyncio.run(bench("client").complete(server.port, body, **options))
        assert (reply.left, reply.error, len(reply.times)) == (True, None, after)
        with server.http() as client:  # it ends long before its 3,000 tokens
            while client.get("/stats").json()["requests"]["running"]:
                pass
            assert client.get("/stats").json()["tokens"]["generated"] < 2000


def test_clients_share_the_jobs_and_stop_in_time(bench):
    load = bench("load")
    with running() as server:
        loaded = asyncio.run(load.load(server.port, [load.Job(BODY)] * 9, clients=4))
        late = [load.Job(BODY), load.Job(BODY, at_s=1e9)]
        some = asyncio.run(load.load(server.port, late, clients=2, seconds=100.0))
    assert len(loaded.replies) == 9
    assert len(some.replies) == 1
    found = load.summary(*loaded)
    assert (found["requests"], found["errors"], found["left"]) == (9, 0, 0)
    assert found["new_tokens"] == sum(x.new_tokens for x in loaded.replies) > 0
    assert 0 < found["p50_ttft_s"] <= found["p99_ttft_s"]


def test_what_is_left_is_told(bench):
    leaks = bench("leaks")
    clean = leaks.Held(1000, 500, 0, 0, 0, 10, 0)
    assert leaks.compared(clean, replace(clean, rss=1019), 0.02)[1] == []
    changes = {
        "rss": 1021, "requests": 5, "pinned_blocks": 1, "open_leases": 2, "open_files": 11,
        "requests_left": 3,
    }  # fmt: skip
    for name, value in changes.items():
        _, wrong = leaks.compared(clean, replace(clean, **{name: value}), 0.02)
        assert len(wrong) == 1, name
    assert leaks.compared(clean, replace(clean, requests=5), None)[0]["leaked_bytes"] == 5
    assert leaks.compared(clean, replace(clean, rss=2000), None)[1] == []


def test_tokens_of_all_streams_are_not_said_to_be_those_of_one(bench):
    times = {f"{p}_{of}_s": 0.02 for p in ("p50", "p99") for of in ("tpot", "gap")}
    phase = {"without": times | {"long_prompts": 0}, "with": times | {"long_prompts": 7}}
    found = {"clients": 8, "new_tokens": 35_950, "long_tokens": 8192, "step_tokens": 512}
    found |= {"phases": {"chunked": phase | {"ratio": 1.0}}}
    assert "35950" not in bench("tables").interference(found)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    small = ["--model", "needle-tiny", "--clients", "3", "--threads", "1"]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--json", *small],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "options"),
    [
        ("mixed", ("--warm", "6", "--generate", "--max-tokens", "600", "--new-tokens", "20")),
        ("long", ("--longest", "3000", "--pinned-mib", "9", "--new-tokens", "16")),
        ("interference", ("--every", "1", "--long-tokens", "2000", "--new-tokens", "16")),
    ],
)
def test_a_profile_ends_with_the_line_that_is_promised(profile, options):
    done = run(profile, "--seconds", "8", *options)
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert set(numbers) >= CONTRACT, done.stderr
    assert numbers["errors"] == numbers["leaked_bytes"] == 0
    assert numbers["requests"] > 0
    assert numbers["p99_ttft_s"] > 0
    assert (done.returncode == 1) == bool(numbers["wrong"])
    if profile == "long":
        assert numbers["spill_read_bytes"] > 0
    if profile == "interference":
        assert set(numbers["tpot_ratio"]) == {"chunked", "whole"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_load_test_that_is_ended_takes_its_server_along(tmp_path, number):
    command = [sys.executable, str(SCRIPT), "--model", "needle-tiny", "--clients", "2"]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}) as process:
        server = wait_for_child(process)
        process.send_signal(number)
        process.wait(LIMIT_S)
    for _ in range(10_000_000):
        if not Path(f"/proc/{server}").exists() or state(server) == "Z":
            return
    raise AssertionError("the server lives on")


def wait_for_child(process: subprocess.Popen[bytes]) -> int:
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            if (
                b"engine.cli" in Path(f"/proc/{child}/cmdline").read_bytes()
            ):  # before that it is a copy of its parent
                return int(child)
    raise AssertionError("the load test ended before its server began")


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
