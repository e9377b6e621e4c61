"""The status page in a browser, beside a server under load."""

import re
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from engine.serve.observed import Observed
from tests.engine.serve.browser import Browser, browser, missing
from tests.engine.serve.figures import app, blend, readings, serving, stats, traced
from tests.engine.serve.server import Running, running

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SIZES = {"phone": (375, 800), "desk": (1200, 900)}
SHOWN = """
    return Object.fromEntries(Array.from(document.querySelectorAll("[data-stat]"),
        (e) => [e.dataset.stat, [e.dataset.as, e.textContent]]));"""


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


def load(server: Running, clients: int = 4) -> None:
    """Requests of a few lengths at once, each twice, so that the second finds KV in the store."""

    def ask(number: int) -> None:
        prompt = "The grass is green. The sky is blue. " * (5 + 10 * (number % 4))
        with server.client() as client:
            for _ in range(2):
                client.completions.create(model=server.model, prompt=prompt, max_tokens=12)

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(clients)))


@contextmanager
def busy(server: Running) -> Generator[None]:
    """Requests one after the other, as long as the body runs: one may end by itself at any time."""
    enough, first = threading.Event(), threading.Event()

    def ask() -> None:
        with server.client() as client:
            while not enough.is_set():
                with client.completions.create(
                    model=server.model, prompt="The sky", max_tokens=2000, stream=True
                ) as stream:
                    for _ in stream:
                        first.set()
                        if enough.is_set():
                            break

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert first.wait(60)
        yield
    finally:
        enough.set()
        thread.join()


def number(text: str) -> float:
    """As the page writes it, in units of one."""
    if text == "–":
        return float("nan")
    found = re.fullmatch(r"([\d.,]+)(?: (%|µs|ms|s|B|kB|MB|GB))?", text)
    assert found, text
    units = {"%": 0.01, "µs": 1e-6, "ms": 1e-3, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    return float(found[1].replace(",", "")) * units.get(found[2] or "", 1.0)


def at(document: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


def moving(path: str) -> bool:
    """What changes though nothing happens."""
    return path in ("process.rss_bytes", "tokens.generated_per_s")


@pytest.mark.parametrize("size", SIZES)
def test_the_page_shows_the_numbers_of_the_server(
    size: str, window: Browser, server: Running
) -> None:
    load(server)
    window.resize(*SIZES[size])
    window.open(server.url)
    window.wait("!document.getElementById('board').hidden")
    with server.http() as client:
        truth = client.get("/stats").json()
    shown = window.run(SHOWN)
    assert len(shown) > 20
    for path, (_, text) in shown.items():
        if not moving(path):
            true = at(truth, path)
            expected = pytest.approx(true, rel=0.06, abs=1e-9) if true is not None else None
            assert (None if text == "–" else number(text)) == expected, path
    assert number(shown["requests.finished"][1]) >= 8
    assert number(shown["tokens.cached"][1]) > 0
    rows = window.run("return document.querySelectorAll('#traces tr').length")
    assert rows == len(truth["traces"]) >= 8
    first = window.run("return document.querySelector('#traces tr').dataset.trace")
    assert first == truth["traces"][0]["id"]
    used = "return document.querySelector('[data-tier=host] [role=meter]').ariaValueNow"
    assert int(window.run(used)) == truth["tiers"][0]["used_bytes"]
    assert window.run("return document.documentElement.scrollWidth") == SIZES[size][0]
    assert window.complaints() == []


def test_the_page_follows_the_server(window: Browser, server: Running) -> None:
    running_now = "document.querySelector('[data-stat=\"requests.running\"]').textContent"
    window.open(server.url)
    with busy(server):
        window.wait(f"{running_now} === '1'")
    window.wait(f"{running_now} === '0'")
    assert window.complaints() == []


def test_a_server_that_is_gone_is_said_to_be_gone(window: Browser) -> None:
    state = "document.getElementById('state').dataset.is"
    observed = Observed("m", readings)
    with serving(app(observed)) as url:
        window.open(url)
        window.wait(f"{state} === 'live'")
    window.wait(f"{state} === 'gone'")
    said = window.run("return document.getElementById('state').textContent")
    assert said.startswith("server cannot be reached, last seen ")
    assert window.run("return document.getElementById('board').className") == "stale"
    assert all("ERR_CONNECTION_REFUSED" in line for line in window.complaints())


def test_a_key_is_asked_for_and_kept_in_the_tab(window: Browser) -> None:
    observed = Observed("m", readings)
    for tenant in ("team-a", "team-b"):
        observed.finished(traced(observed), status=200, tenant=tenant, stats=stats(blend=blend()))
    asked = "!document.getElementById('ask').hidden"
    give = """
        document.getElementById("key").value = arguments[0];
        document.querySelector("button").click();"""
    with serving(app(observed, keys=True)) as url:
        window.open(url)
        window.wait(asked)
        window.run(give, "sk-wrong")
        window.wait(f"{asked} && !document.getElementById('refused').hidden")
        window.run(give, "sk-all")
        window.wait("document.querySelectorAll('#traces tr').length === 2")
        window.open(url)  # again, in the same tab
        window.wait("document.querySelectorAll('#traces tr').length === 2")
        text = window.run("return document.body.innerText")
        assert "team-a" in text
        assert "team-b" in text
        assert "sk-all" not in window.run("return document.documentElement.outerHTML")
        assert all(" 401 " in line for line in window.complaints())


def test_names_of_others_are_text_and_nothing_else(window: Browser) -> None:
    evil = "<img src=x onerror=document.title='owned'>"
    observed = Observed(evil, lambda: readings())
    trace = traced(observed, f"POST {evil}")
    observed.finished(trace, status=200, tenant=evil)
    with serving(app(observed)) as url:
        window.open(url)
        window.wait("document.querySelectorAll('#traces tr').length === 1")
        assert window.run("return document.images.length") == 0
        assert window.run("return document.getElementById('model').textContent") == evil
        assert window.complaints() == []


CONTRAST = """
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const low = [];
    for (const e of document.querySelectorAll("header *, main *")) {
        const own = Array.from(e.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.getClientRects().length) continue;
        const own_light = light(parse(getComputedStyle(e).color)), other = light(behind(e));
        const [less, more] = [own_light, other].sort((x, y) => x - y);
        if ((more + 0.05) / (less + 0.05) < 4.5) low.push(e.outerHTML.slice(0, 80));
    }
    return low;"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_has_the_contrast_that_wcag_asks_for(dark: bool, window: Browser) -> None:
    observed = Observed("m", readings)
    observed.finished(traced(observed), status=200, stats=stats(blend=blend()))
    observed.finished(traced(observed), status=429)
    with serving(app(observed)) as url:
        window.resize(1200, 900, dark=dark)
        window.open(url)
        window.wait("!document.getElementById('board').hidden")
        background = window.run("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", background))) < 60) == dark
        assert window.run(CONTRAST) == []
        unnamed = """return Array.from(document.querySelectorAll('[role=img],[role=meter],section'))
            .filter((e) => !e.ariaLabel && !e.getAttribute('aria-labelledby'))
            .map((e) => e.outerHTML.slice(0, 80));"""
        assert window.run(unnamed) == []
