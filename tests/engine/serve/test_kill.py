"""A server that is killed in the middle of its work leaves a store that is sound, and warm."""

import json
import threading
from collections.abc import Iterator
from queue import Queue

import httpx
import pytest

from engine.cli import main
from tests.engine.serve.server import LIMIT_S, Process, process

SHARED = "The special magic number for tiger is 7319. " + "The wind went over the grey hills. " * 60
WORDS = ("ruby", "castle", "winter", "harbor", "amber", "comet")
SETTINGS = """
block_tokens = 16
[store]
host_bytes = 16777216
[serve]
max_concurrent = 64
"""


def body(word: str, new_tokens: int) -> dict:
    prompt = f"{SHARED} Of {word} nobody speaks. What is it? It is"
    return {
        "model": "needle-tiny", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def streamed(url: str, word: str, new_tokens: int) -> Iterator[dict]:
    """Events of a completion, until it ends or the server does."""
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body(word, new_tokens), timeout=LIMIT_S
    ) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def answered(url: str, word: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    events = list(streamed(url, word, 8))
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    return text, events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]


def wait_until_written(url: str) -> None:
    for _ in range(10_000):
        if httpx.get(f"{url}/stats", timeout=LIMIT_S).json()["queued_bytes"] == 0:
            return
    raise AssertionError("the store does not finish its writes")


class Load:
    """Streams that go on until the server is gone. Each event is a stream's name, or its end."""

    def __init__(self, server: Process) -> None:
        self.said: Queue[str] = Queue()
        self._url = server.url
        self._threads = [threading.Thread(target=self._stream, args=(x,)) for x in WORDS]
        for thread in self._threads:
            thread.start()

    def wait(self, events: int) -> None:
        """Until so many came, and some of every stream."""
        seen: set[str] = set()
        while events > 0 or seen != set(WORDS):
            seen.add(self.said.get(timeout=LIMIT_S))
            events -= 1

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()

    def _stream(self, word: str) -> None:
        try:
            while True:
                for _ in streamed(self._url, word, 200):
                    self.said.put(word)
        except httpx.TransportError:  # killed, as it should be
            return


def kill_in_the_middle(tmp_path, capsys, events: int, first: str | None) -> str:
    """One life of a server, and what it leaves; the answer to a question, always the same."""
    config, store = tmp_path / "settings.toml", str(tmp_path / "store")
    config.write_text(SETTINGS)
    with process("--store", store, config=config) as server:
        text, cached = answered(server.url, "tiger")
        if first is not None:
            assert cached > 0, "the restarted server computes what the store has"
            assert text == first
        wait_until_written(server.url)
        load = Load(server)
        load.wait(events)
        server.kill()
        load.join()
    assert main(["store", "audit", "--store", store, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clean"], report
    assert report["blocks"] > 0
    return text


def test_a_killed_server_leaves_a_sound_store_and_starts_warm(tmp_path, capsys):
    text = kill_in_the_middle(tmp_path, capsys, 40, None)
    with process("--store", str(tmp_path / "store"), config=tmp_path / "settings.toml") as server:
        again, cached = answered(server.url, "tiger")
        assert again == text
        assert cached > 400
        assert server.stop() == 0


@pytest.mark.slow
def test_servers_that_are_killed_again_and_again_leave_a_sound_store(tmp_path, capsys):
    text = None
    for events in (1, 17, 90, 260):
        text = kill_in_the_middle(tmp_path, capsys, events, text)
