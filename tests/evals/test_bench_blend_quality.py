"""The benchmark of blending's quality says what it promises; the whole of it runs in small."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from engine.blend.repair import BlendConfig, BlendReport

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_blend_quality.py"


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with few shares and short prompts."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_blend_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_blend_quality", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARES", (0.0, 0.2, 0.6))
    small = {name: given._replace(tokens=700) for name, given in module.INPUTS.items()}
    monkeypatch.setattr(module, "INPUTS", small)
    return module


def run(bench, monkeypatch, *options):
    words = ["bench_blend_quality.py", "--model", "needle-tiny", "--samples", "1", *options]
    monkeypatch.setattr(sys, "argv", words)
    return bench.main()


def paragraphs(path):
    texts = [f"Paragraph {i} is about a river. " * 8 for i in range(3)]
    rows = [{"title": "T", "paragraph_text": x, "is_supporting": True} for x in texts]
    asked = {"question": "Where?", "answer": "Here", "paragraphs": rows}
    path.write_text(json.dumps([asked]))
    return str(path)


def test_the_last_line_is_that_of_the_contract(bench, monkeypatch, capsys, tmp_path):
    files = ["--musique", paragraphs(tmp_path / "rows.json"), "--plot", str(tmp_path / "x.png")]
    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
    assert run(bench, monkeypatch, "--json", *files) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (tmp_path / "x.png").stat().st_size > 1000
    one, real = found.pop("single_hop"), found.pop("real_text")
    assert set(found) == {*bench.POLICIES, "full", "compare"}
    assert set(one) == set(real) == set(found)
    for rows in (found, one, real):
        assert set(rows["reposition"]) == {"0"}  # it spends nothing
        assert set(rows["deviation"]) == {"0.6"}  # its check layers are two of four
        assert set(rows["boundary"]) == {"0", "0.2", "0.6"}
        assert {"0", "0.6"} <= set(rows["query"])  # at 0 nothing is probed
    for points in (point for rows in (found, one) for p in bench.POLICIES for point in [rows[p]]):
        assert all(set(x) == {"kl", "right"} for x in points.values())
    assert all(set(x) == {"kl"} for p in bench.POLICIES for x in real[p].values())
    assert one["full"] == {"right": 1.0}
    assert set(found["compare"]) == {"share", "deviation_kl", "default_kl"}
    assert found["compare"]["share"] == 0.6


def test_tables_are_for_people(bench, monkeypatch, capsys):
    assert run(bench, monkeypatch, "--inputs", "single_hop") == 0
    out = capsys.readouterr().out
    assert "single hop: KL" in out
    assert "single hop: answers right" in out
    assert f"{BlendConfig().policy} *" in out
    assert "at 0.6, the smallest share that both reach" in out


def test_real_text_is_left_out_where_there_is_none(bench, monkeypatch, capsys):
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    assert run(bench, monkeypatch, "--json", "--inputs", "real_text", "single_hop") == 0
    done = capsys.readouterr()
    assert "no real text: it needs --musique, or HEADRACE_DATA" in done.err
    assert "real_text" not in json.loads(done.out.splitlines()[-1])


def test_a_model_that_is_not_there_is_one_line(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--model", "/nowhere/at/all", "--inputs", "two_hop"])
    assert bench.main() == 1
    assert "model not found" in capsys.readouterr().err


def test_a_share_is_reached_to_a_block(bench):
    def reached(charged, share, reused=1600):
        return bench._reached(BlendReport(charged=charged, reused_tokens=reused), share)

    assert reached(0.2, 0.2)
    assert reached(0.191, 0.2)
    assert not reached(0.189, 0.2)
    assert not reached(0.201, 0.2)
    assert not reached(0.0, 0.05)


def test_policies_are_compared_where_both_are_first(bench):
    point = {"kl": 1.0, "charged": 0.3}
    rows = {
        bench.DEFAULT: {"0.05": point, "0.3": point | {"kl": 0.25}, "0.4": point},
        bench.RIVAL: {"0.3": point, "0.4": point},
    }
    found = bench.compare(rows)
    assert found == {"share": 0.3, "deviation_kl": 1.0, "default_kl": 0.25}
    assert "target, at most 0.5 of that: met" in bench._verdict(found)
    assert "missed" in bench._verdict(found | {"default_kl": 0.51})
    assert bench.compare({bench.DEFAULT: {}, bench.RIVAL: {"0.3": point}}) is None
    assert "no share in common" in bench._verdict(None)
