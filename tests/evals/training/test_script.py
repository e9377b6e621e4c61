"""The script: trains, goes on, writes a model that the engine serves, and says what is wrong."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from evals.training.__main__ import main as examine
from evals.training.network import load

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_reference_model.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_reference_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    assert script.main(["--out", str(folder), "--tiny"]) == 0
    return folder


def test_it_logs_what_it_has_learned(out):
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4
    assert set(line["exam"]) >= {"single", "two_hops"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_engine_answers_with_the_networks_likeliest_token(out, dtype):
    with Engine.from_pretrained(out / "model", device="cpu", dtype=dtype) as engine:
        tokens = engine.tokenize("What is tiger? tiger is")
        (answer,) = engine.generate([tokens], max_new_tokens=1)
    network, ids = load(out / "model"), torch.as_tensor(tokens)[None]
    with torch.no_grad():
        logits = network.lm_head(network(ids, torch.arange(ids.shape[1])[None])[0, -1])
    assert answer.tokens == [int(logits.argmax())]


def test_a_training_that_is_complete_has_nothing_to_go_on_with(script, out):
    before = (out / "log.jsonl").read_text()
    assert script.main(["--out", str(out), "--tiny", "--resume"]) == 0
    assert (out / "log.jsonl").read_text() == before


def test_a_model_is_trained_on_from_its_weights(script, out, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TINY_STEPS", 1)
    assert script.main(["--out", str(tmp_path), "--tiny", "--refine", str(out / "model")]) == 0
    before, after = (load(folder / "model").state_dict() for folder in (out, tmp_path))
    moved = torch.cat([(after[name] - before[name]).flatten() for name in before])
    anew = load(out / "model")
    torch.manual_seed(0)
    fresh = type(anew)(anew.shape).state_dict()
    apart = torch.cat([(fresh[name] - before[name]).flatten() for name in before])
    assert 0 < moved.norm() < 0.1 * apart.norm()
    tokenizers = [(folder / "model" / "tokenizer.json").read_bytes() for folder in (out, tmp_path)]
    assert tokenizers[0] == tokenizers[1]


@pytest.mark.parametrize("folder", ["none", "reference"])
def test_a_model_that_cannot_be_trained_on_is_one_line(script, tmp_path, folder, capsys):
    model = SCRIPT.parents[1] / "models" / folder
    assert script.main(["--out", str(tmp_path), "--tiny", "--refine", str(model)]) == 1
    assert capsys.readouterr().err.startswith("train_reference_model: no model")


def test_what_it_wrote_can_be_examined_again(out, capsys):
    marked = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["exam"]
    assert examine([str(out / "model"), "--lengths", "160", "--windows", "1"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["length"] == 160
    assert set(line) - {"length", "windows"} == set(marked)


def test_windows_without_room_for_an_answer_are_one_line(out, capsys):
    assert examine([str(out / "model"), "--lengths", "8", "--windows", "1"]) == 1
    assert capsys.readouterr().err.endswith("8 tokens have no room for an answer: take more\n")


def test_examining_no_model_is_one_line(tmp_path, capsys):
    assert examine([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("evals.training: no model in")


def test_a_missing_text_is_one_line_without_a_traceback(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--text", str(tmp_path / "no.txt")]) == 1
    assert capsys.readouterr().err.startswith("train_reference_model: cannot read the text")


def test_nothing_to_resume_is_one_line(script, tmp_path, out, capsys):
    assert script.main(["--out", str(tmp_path), "--tiny", "--resume"]) == 1
    assert "train without --resume first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "0"], "--lengths are tokens, at least 1, got 0"),
        (["--lengths", "512", "-5"], "--lengths are tokens, at least 1, got -5"),
        (["--windows", "0"], "--windows must be at least 1, got 0"),
        (["--text", "binary"], "binary is not UTF-8 text"),
    ],
)
def test_what_nothing_can_be_examined_with_is_one_line(
    tmp_path, monkeypatch, capsys, options, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\xfe")
    assert examine([str(SCRIPT.parents[1] / "models" / "reference"), *options]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert said in printed.err
