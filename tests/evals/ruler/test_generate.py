"""`headrace-eval generate`: the file it writes, and what it says of wrong options."""

import json
import os
from argparse import ArgumentParser
from pathlib import Path

import pytest

from engine.errors import ConfigError, ModelError, PromptError
from evals.commands import generate

TINY = Path(__file__).parents[3] / "models" / "needle-tiny"


def run(*options, out, tokenizer=TINY, task="vt", length="2k", count="3"):
    parser = ArgumentParser()
    generate.add(parser)
    given = ["--task", task, "--length", length, "--count", count, "--out", str(out)]
    return generate.run(parser.parse_args([*given, "--tokenizer", str(tokenizer), *options]))


@pytest.mark.parametrize("task", ["vt", "niah_multikey_1", "fwe"])
def test_it_writes_ruler_s_fields_in_ruler_s_form(task, tmp_path, tiny, capsys):
    out = tmp_path / "out.jsonl"
    assert run(task=task, out=out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert list(row) == ["index", "input", "outputs", "answer_prefix", "length"]
        prompt = tiny(row["input"] + row["answer_prefix"])["input_ids"]
        new_tokens = {"vt": 30, "fwe": 50}.get(task, 128)
        assert row["length"] == len(prompt) + new_tokens <= 2048
        assert not row["input"].endswith(row["answer_prefix"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "3 samples, " in printed.err
    assert list(tmp_path.iterdir()) == [out]


def test_the_same_options_write_the_same_bytes_and_another_seed_others(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, ("5", "5", "6")):
        run("--seed", seed, out=path)
    one, same, other = (path.read_bytes() for path in paths)
    assert one == same != other


def test_chat_leaves_room_for_the_template(tmp_path, bpe):
    folder, out = tmp_path / "tokenizer", tmp_path / "out.jsonl"
    bpe.save_pretrained(folder)
    run("--chat", out=out, tokenizer=folder, count="1")
    row = json.loads(out.read_text())
    message = [{"role": "user", "content": row["input"]}]
    text = bpe.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = bpe(text + row["answer_prefix"], add_special_tokens=False)["input_ids"]
    assert row["length"] == len(ids) + 30


def test_haystack_and_rows_are_the_user_s(tmp_path, squad_rows, hotpotqa_rows):
    out, text = tmp_path / "out.jsonl", tmp_path / "text.txt"
    text.write_text("Ships sail far. " * 9)
    run("--haystack", str(text), out=out, task="niah_single_2")
    assert "Ships sail far. Ships sail far." in json.loads(out.read_text().splitlines()[0])["input"]
    for name, task, rows in (("squad", "qa_1", squad_rows), ("hotpotqa", "qa_2", hotpotqa_rows)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        run(f"--{name}", str(path), out=out, task=task)
        assert json.loads(out.read_text().splitlines()[0])["outputs"]


def test_what_is_wrong_is_one_line_and_leaves_no_file(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match=r"needs .* tokens at the least"):
        run(out=out, length="300")
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
        run(out=out, count="0")
    with pytest.raises(ModelError, match="gone"):
        run(out=out, tokenizer=tmp_path / "gone")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        run(out=out, tokenizer=tmp_path)
    with pytest.raises(PromptError, match="cannot read"):
        run("--haystack", str(tmp_path / "gone.txt"), out=out)
    with pytest.raises(FileNotFoundError):
        run(out=tmp_path / "no" / "folder.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", ["0", "-4k", "many", ""])
def test_a_length_is_a_number_of_tokens(length, tmp_path):
    with pytest.raises(ConfigError, match="like 4096 or 4k"):
        run(f"--length={length}", out=tmp_path / "x")


@pytest.mark.parametrize("out", [".", "/", "", "folder"])
def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="--out names a file for the prompts, got a folder"):
        run(out=out)


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="got a folder or device"):
        run(out=pipe)
    assert pipe.is_fifo()
