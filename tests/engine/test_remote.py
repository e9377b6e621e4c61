"""Engines of several processes that share KV through one server, and nothing else."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from queue import Queue
from threading import current_thread

import pytest

from engine import Engine
from engine.blend.segments import Segments
from engine.cli import main
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.service.ask import Ask
from engine.service.service import Service
from kvstore.config import StoreConfig
from kvstore.remote.config import RemoteConfig
from kvstore.remote.guarded import Guarded
from tests.caches import own_cache
from tests.engine.families import build, prompt
from tests.kvstore.remote.server import SECRET, serving

ROOT = Path(__file__).parents[2]
NOTES = "The special magic number for tiger is 314159. Nobody objected. " * 40
QUESTION = "The special magic number for tiger is"


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def generated(server, cache, *options, secret=SECRET):
    """What `headrace generate` says in a process of its own, which shares compiled code only."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "generate", NOTES + QUESTION, "--json", "--no-store",
         "--max-new-tokens", "4", "--remote", server.url, *options],
        env=os.environ | {
            "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache),
            "HEADRACE_REMOTE_SECRET": secret.decode(),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_process_starts_from_what_another_has_computed(server, tmp_path):
    cache = own_cache(tmp_path)
    first = generated(server, cache)
    again = generated(server, cache)
    assert first["stats"]["cached_tokens"] == 0
    assert again["stats"]["cached_tokens"] >= first["stats"]["prompt_tokens"] - 64
    assert again["text"] == first["text"]
    stranger = generated(server, cache, secret=b"another secret of enough bytes")
    assert stranger["stats"]["cached_tokens"] == 0


def test_a_service_asks_for_a_prompt_in_the_thread_that_brings_it(server, monkeypatch):
    """A slow server holds up that prompt, and no answer."""
    monkeypatch.setenv("HEADRACE_REMOTE_SECRET", SECRET.decode())
    module, asked = build("llama"), []
    chunks = [prompt(40, seed=n).tolist() for n in (1, 2)]
    prompts = [prompt(90, seed=5).tolist(), Segments(prompt(5).tolist(), chunks, [7, 8, 9])]
    store = StoreConfig(host_bytes=1 << 26, remote=server.config())
    settings = EngineConfig(block_tokens=16, store=store)
    with Engine(module, config=settings) as engine:
        want = [done.tokens for done in served(engine, prompts)]

    ask = Guarded.ask
    monkeypatch.setattr(
        Guarded, "ask", lambda self, call: asked.append(current_thread().name) or ask(self, call)
    )
    with Engine(module, config=settings) as engine:
        got = served(engine, prompts)
        assert engine.stats().tiers["remote"].hits >= 5 + 6
    assert [done.tokens for done in got] == want
    assert all(done.stats.cached_tokens >= 80 for done in got)
    assert "MainThread" in asked
    assert "headrace-engine" not in asked


def served(engine, prompts):
    """Completions of a service, one after the other."""
    done, service = [], Service(engine)
    with closing(service):
        for one in prompts:
            events: Queue = Queue()
            service.submit(Ask(prompt=one, max_new_tokens=4), events.put)
            while (last := events.get(timeout=60)).completion is None:
                pass
            done.append(last.completion)
    return done


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--remote", "http://host"], "url must be redis://"),
        (["--remote", "redis://host"], "HEADRACE_REMOTE_SECRET"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(options, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HEADRACE_REMOTE_SECRET", raising=False)
    assert main(["generate", "hello", *options]) != 0
    err = capsys.readouterr().err
    assert complaint in err
    assert "Traceback" not in err


def test_a_server_is_set_in_toml(tmp_path):
    file = tmp_path / "headrace.toml"
    file.write_text('[store.remote]\nurl = "redis://host:7000/2"\nttl_s = 60\ntimeout_s = 2\n')
    remote = EngineConfig.from_toml(file).store.remote
    assert remote == RemoteConfig(url="redis://host:7000/2", ttl_s=60, timeout_s=2.0)
    file.write_text('[store.remote]\nurl = "redis://host"\nttl = 60\n')
    with pytest.raises(ConfigError, match=r"unknown field `ttl`.*store\.remote\.ttl_s"):
        EngineConfig.from_toml(file)
    file.write_text('[store.remote]\nurl = "redis://user@host"\n')
    with pytest.raises(ConfigError, match="a user without a password"):
        EngineConfig.from_toml(file)
