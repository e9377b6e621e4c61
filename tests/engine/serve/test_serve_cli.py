"""`headrace serve` in a process of its own."""

import errno
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest

from engine.cli import main
from engine.commands import serve as serve_module
from engine.errors import ConfigError
from engine.serve.config import ServeConfig
from engine.serve.server import Server, bound
from kvstore.disk.ledger import Ledger
from tests.engine.serve.server import LIMIT_S, process

ASKED = {"model": "needle-tiny", "prompt": "One", "max_tokens": 2}


def test_it_serves_and_stops_cleanly(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[serve]\naliases = ["other"]\ndrain_s = 60.0\n')
    with process("--store", str(tmp_path / "store"), config=config) as server:
        with httpx.Client(base_url=server.url, timeout=LIMIT_S) as client:
            assert client.get("/readyz").status_code == 200
            done = client.post("/v1/completions", json=ASKED | {"model": "other"})
            assert done.status_code == 200
            running = {"max_tokens": 400, "stream": True, "seed": 1, "temperature": 2}
            with client.stream("POST", "/v1/completions", json=ASKED | running) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.signal(signal.SIGTERM)  # what runs may end
                assert "[DONE]" in list(lines)[-2]
        assert server.wait() == 0
    ready = [line for line in server.stderr if "ready" in line]
    assert ready == [f"ready {server.url}\n"]
    assert "Traceback" not in "".join(server.stderr)
    logged = [json.loads(line) for line in server.stdout]
    assert [line["status"] for line in logged] == [200, 200, 200]
    assert logged[-1]["new_tokens"] == 400


def test_blocks_that_were_not_stored_are_no_failure_of_its_end(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def run(server, *_args, **_options):
        thread = threading.Thread(target=ask, args=(server,))
        thread.start()
        serve(server, signals=False)
        thread.join()

    def ask(server):
        with httpx.Client(base_url=server.url, timeout=LIMIT_S) as client:
            done = client.post("/v1/completions", json=ASKED | {"prompt": "One. " * 100})
        server.stop()
        assert done.status_code == 200

    serve = Server.run
    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(Ledger, "add", full)
    for of_a_process in ("bound_caches", "few_arenas"):
        monkeypatch.setattr(serve_module, of_a_process, lambda: None)
    monkeypatch.setattr(serve_module, "_access_log", lambda config: nullcontext())
    assert main(["serve", "--port", "0", "--store", str(tmp_path)]) == 0
    assert "blocks were not stored: no space left" in caplog.text


@pytest.mark.slow
def test_a_second_signal_does_not_wait(tmp_path):
    with (
        process("--no-store") as server,
        ThreadPoolExecutor() as threads,
        httpx.Client(base_url=server.url, timeout=LIMIT_S) as client,
    ):
        began = threading.Event()

        def ask() -> None:
            asked = ASKED | {"max_tokens": 30_000, "stream": True}
            with client.stream("POST", "/v1/completions", json=asked) as stream:
                for _ in stream.iter_lines():
                    began.set()

        asking = threads.submit(ask)
        assert began.wait(LIMIT_S)
        server.signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:  # it has heard the first one
            pass
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert asking.exception(LIMIT_S) is not None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--host", "0.0.0.0"], "there are no keys: everybody who reaches it"),
        (["--port", "99999"], "serve.port is a number from 0 to 65535"),
        (["--model", "/nowhere", "--port", "0"], "/nowhere"),
        (["--host", "127.0.0.1", "--config", "/none.toml"], "cannot read /none.toml"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, args, said):
    check_mistake(capsys, args, said)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        said = f"port {number}: Address already in use; set serve.host and serve.port"
        check_mistake(capsys, ["--model", "/nowhere", "--port", number], said)


def test_an_address_is_taken_once_whoever_listens_first():
    with bound(ServeConfig(host="::1", port=0)) as first:
        port = first.getsockname()[1]
        with bound(ServeConfig(host="::1", port=port)) as second:
            second.listen()
            with pytest.raises(ConfigError, match=f"cannot listen at ::1, port {port}"):
                Server(lambda *_: None, ServeConfig(host="::1", port=port), lambda: None, first)


def check_mistake(capsys, args, said):
    assert main(["serve", "--no-store", *args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client"])
def test_packages_that_are_missing_are_told_by_the_command_that_brings_them(
    capsys, monkeypatch, missing
):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == missing else there(x))
    assert main(["serve", "--no-store", "--model", "/nowhere"]) == 1
    assert "pip install 'headrace[serve]'" in capsys.readouterr().err


SHAPES = """
import re
from pathlib import Path
import torch
from engine.commands.serve import bound_caches

def resident():
    return int(re.findall(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) / 1024

bound_caches()
weight = torch.randn(256, 64, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.randn(4, 64, dtype=torch.bfloat16), weight)
before = resident()
for rows in range(5, 505):
    torch.nn.functional.linear(torch.randn(rows, 64, dtype=torch.bfloat16), weight)
print(resident() - before)
"""


def test_memory_does_not_grow_with_every_shape_that_was_computed():
    """Without the bounds it takes 350 MiB where bf16 products are compiled."""
    ran = subprocess.run(
        [sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 200
