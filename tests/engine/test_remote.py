"""Engines of several processes that share KV through one server, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from engine.config import EngineConfig
from engine.errors import ConfigError
from kvstore.remote.config import RemoteConfig
from tests.caches import own_cache
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
