"""`headrace trace` against a server of figures."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.cli import main
from engine.serve.observed import Observed
from engine.service.spans import NAMES
from tests.engine.serve.figures import app, readings, serving, stats, traced


@pytest.fixture(scope="module")
def observed() -> Observed:
    made = Observed("m", readings)
    for number, tenant in enumerate(("team-a", "team-b")):
        trace = traced(made)
        trace.attributes["request_id"] = f"req-{number}"
        made.finished(trace, status=200, tenant=tenant, stats=stats())
    return made


@pytest.fixture(scope="module")
def url(observed: Observed) -> Iterator[str]:
    with serving(app(observed)) as made:
        yield made


@pytest.fixture(scope="module")
def keyed_url(observed: Observed) -> Iterator[str]:
    with serving(app(observed, keys=True)) as made:
        yield made


def test_it_lists_requests_with_their_shares(
    url: str, observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "--url", url]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["id", "at"]
    assert [line.split()[0] for line in lines] == [t.id[:16] for t in observed.recent.traces()]
    trace = observed.recent.traces()[0]
    send = trace.totals["send"].busy_ns / trace.wall_ns
    for said in ("4,096", "3,072", "51", f"{trace.covered_ns / trace.wall_ns:.1%}", f"{send:.0%}"):
        assert said in lines[0]


@pytest.mark.parametrize("by", ["id", "start", "request"])
def test_one_request_is_a_waterfall(
    by: str, url: str, observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = observed.recent.traces()[0]
    named = {"id": trace.id, "start": trace.id[:8], "request": "req-1"}[by]
    assert main(["trace", named, "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert trace.id in lines[0]
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in NAMES]
    assert [row.split()[0] for row in rows] == list(NAMES)
    bars = [row.find("█") for row in rows if "█" in row]
    assert bars == sorted(bars)
    assert len(bars) > 6
    assert "spans cover" in lines[-2]


def test_json_is_what_the_server_said(
    url: str, observed: Observed, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "--url", url, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [t["id"] for t in json.loads(line)["traces"]] == [t.id for t in observed.recent.traces()]


def test_opentelemetry_goes_to_a_file_or_to_stdout(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "traces.json"
    assert main(["trace", "req-0", "--url", url, "--otlp", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["trace", "req-0", "--url", url, "--otlp", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    (resource,) = json.loads(path.read_text())["resourceSpans"]
    assert len(resource["scopeSpans"][0]["spans"]) == 1 + len(NAMES)


def test_a_key_shows_its_tenants_requests(
    keyed_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["trace", "--url", keyed_url, "--key", "sk-a", "req-0"]) == 0
    assert main(["trace", "--url", keyed_url, "--key", "sk-a", "req-1"]) == 1
    assert "knows no request req-1" in capsys.readouterr().err
    assert main(["trace", "--url", keyed_url]) == 1
    assert "--key" in capsys.readouterr().err
    monkeypatch.setenv("HEADRACE_API_KEY", "sk-b")
    assert main(["trace", "--url", keyed_url, "req-1"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1:1"], "start one with headrace serve"),
        (["--url", "file:///etc"], "starts with http"),
        (["--url", "http://127.0.0.1:x"], "no server at"),
        (["--url", "http://127.0.0.1:1", "caf\udce9"], "start one with headrace serve"),
        (["--url", "http://[bad"], "cannot be sent"),
        (["--url", "http://127.0.0.1:1", "--key", "sk-\u2026"], "cannot be sent"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_another_server_is_told_from_ours(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--url", f"{url}/nowhere"]) == 1
    assert "404" in capsys.readouterr().err
    assert main(["trace", "--url", f"{url}/?", "--otlp", "-"]) == 1
    assert "does not answer as headrace does" in capsys.readouterr().err
    assert main(["trace", "--url", f"{url}/?"]) == 1  # the page
    assert "does not answer as headrace does" in capsys.readouterr().err
