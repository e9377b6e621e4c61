"""What a tenant learns of another's documents and prompts: nothing, not even by the clock."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from engine.serve.config import KeyConfig
from tests.engine.serve.server import Running, running

KEYS = {"ada": KeyConfig(key="sk-ada", salt="one"), "bob": KeyConfig(key="sk-bob", salt="two")}
ROUNDS = 5
WORDS_LONG = 1000
WORDS = (
    "hills",
    "grey",
    "wind",
    "over",
    "them",
    "all",
    "day",
    "nobody",
    "came",
    "by",
    "the",
    "sea",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(keys=KEYS) as made:
        yield made


@pytest.fixture
def ada(server: Running) -> Iterator[httpx.Client]:
    with server.http("sk-ada") as client:
        yield client


@pytest.fixture
def bob(server: Running) -> Iterator[httpx.Client]:
    with server.http("sk-bob") as client:
        yield client


def text(number: int, words: int = 700) -> str:
    """Each number's is another one, from its first word on."""
    return f"{number} " + " ".join(WORDS[(number * n + n // 7) % len(WORDS)] for n in range(words))


def add(client: httpx.Client, number: int) -> str:
    reply = client.post("/v1/documents", json={"documents": [{"text": text(number)}]})
    assert reply.status_code == 200, reply.text
    return reply.json()["data"][0]["id"]


def chat(client: httpx.Client, documents: list[Any]) -> httpx.Response:
    body = {
        "model": "needle-tiny", "max_tokens": 1, "temperature": 0, "documents": documents,
        "messages": [{"role": "user", "content": "What is the wind?"}],
    }  # fmt: skip
    return client.post("/v1/chat/completions", json=body)


def complete(client: httpx.Client, prompt: str) -> httpx.Response:
    body = {"model": "needle-tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    return client.post("/v1/completions", json=body)


def cached(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def timed(act: Callable[[], httpx.Response]) -> float:
    """Seconds to an answer of one token: that is the first token's."""
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


ASKED: dict[str, Callable[[httpx.Client, str], httpx.Response]] = {
    "get": lambda client, name: client.get(f"/v1/documents/{name}"),
    "delete": lambda client, name: client.delete(f"/v1/documents/{name}"),
    "chat": lambda client, name: chat(client, [name]),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_another_tenants_document_is_as_unknown_as_none(ada, bob, ask):
    known = add(ada, 1)
    unknown = known[:-4] + ("0000" if known[-4:] != "0000" else "1111")
    ask(bob, known)  # nothing comes of it the first time either
    theirs, none = ask(bob, known), ask(bob, unknown)
    assert theirs.status_code == none.status_code == 404
    assert theirs.text.replace(known, "ID") == none.text.replace(unknown, "ID")
    differ = {"date", "x-request-id"}
    assert set(theirs.headers) == set(none.headers)
    for name in set(theirs.headers) - differ:
        assert theirs.headers[name] == none.headers[name]
    assert ada.get(f"/v1/documents/{known}").status_code == 200
    assert bob.get("/v1/documents").json()["data"] == []


@pytest.mark.slow  # it measures time
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_the_clock_does_not_tell_another_tenants_document_from_none(ada, bob, ask):
    known = [add(ada, 10 + n) for n in range(3)]
    unknown = [name[::-1] for name in known]
    times: dict[str, list[float]] = {"known": [], "unknown": []}
    for n in range(60):  # in turns, so that whatever else the machine does meets both
        for kind, names in [("known", known), ("unknown", unknown)][:: 1 if n % 2 else -1]:
            times[kind].append(timed(lambda n=n, names=names: ask(bob, names[n % 3])))
    alike(times["known"], times["unknown"])


def alike(first: list[float], second: list[float]) -> None:
    """Medians no further apart than the times of one kind are spread."""
    apart = abs(statistics.median(first) - statistics.median(second))
    assert apart <= max(spread(first), spread(second)), (first, second)


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


@pytest.mark.slow  # it measures time
@pytest.mark.parametrize("kind", ["prompt", "document"])
def test_what_another_tenant_has_cached_saves_no_time(ada, bob, kind):
    """Own, another's and nobody's texts, in turns: only one's own are faster."""

    def ask(client: httpx.Client, number: int) -> httpx.Response:
        if kind == "prompt":
            return complete(client, text(number, WORDS_LONG))
        return chat(client, [{"text": text(number, WORDS_LONG)}])

    times: dict[str, list[float]] = {"own": [], "another's": [], "nobody's": []}
    counts: dict[str, list[int]] = {name: [] for name in times}
    for number in range(100, 100 + ROUNDS):
        ask(ada, number)
        asked = {"own": (ada, number), "another's": (bob, number), "nobody's": (bob, 1000 + number)}
        for name, (client, which) in asked.items():
            begun = time.perf_counter()
            reply = ask(client, which)
            times[name].append(time.perf_counter() - begun)
            counts[name].append(cached(reply))
    assert min(counts["own"]) > 500
    if kind == "prompt":  # a document's KV is computed once, and reused, in the same request
        assert not any(counts["another's"] + counts["nobody's"])
    medians = {name: statistics.median(x) for name, x in times.items()}
    assert medians["own"] < 0.7 * medians["nobody's"], "the clock could not tell anything"
    assert medians["another's"] > 0.75 * medians["nobody's"], times
