"""`headrace rag` and `headrace demo rag`: what they print, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.cli import main
from engine.config import EngineConfig
from engine.demo import rag as demo_rag
from engine.demo.demo import DemoError
from engine.demo.rag_process import ordered
from engine.rag.catalogue import Document
from tests.caches import own_cache
from tests.engine.rag.corpus import FACTS, documents

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """A folder of documents, from where the commands are run, with a store of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache(tmp_path / "cache")))
    folder = tmp_path / "notes"
    folder.mkdir()
    for document in documents()[:2]:
        (folder / f"{document['id']}.txt").write_text(document["text"])
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def rag(capsys):
    def run(*args) -> tuple[int, str, str]:
        try:
            status = main(["rag", *(str(arg) for arg in args)])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_store_is_cleared_of_kv_and_of_documents_only_where_that_is_said(rag, notes, capsys):
    rag("add", "notes")
    folder = notes.parent / "cache" / "headrace" / "store"
    assert main(["store", "clear", "--yes"]) == 0
    assert "documents are still on record with their texts: 1 catalogues" in capsys.readouterr().out
    assert len(rag("list")[1].splitlines()) == 2
    assert rag("ask", FACTS[1].question, "--max-new-tokens", 8)[1] == f"{FACTS[1].value}.\n"
    assert main(["store", "clear", "--yes", "--documents", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["catalogues"] == 1
    text = FACTS[1].value.encode()
    assert not [file for file in folder.iterdir() if text in file.read_bytes()]
    assert rag("list")[1] == ""


def test_documents_are_added_asked_listed_and_deleted(rag, notes):
    status, out, err = rag("add", "notes")
    assert (status, out) == (0, "2 documents in 2 chunks\n")
    assert "left out:" in err
    assert "picture.png is not UTF-8" in err
    assert "empty.txt is empty" in err
    status, out, err = rag("ask", FACTS[1].question, "--max-new-tokens", 8)
    assert (status, out) == (0, f"{FACTS[1].value}.\n")
    assert str(notes / "del.txt") in err
    assert "of them reused" in err
    status, out, _ = rag("list")
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        str(notes / "assert.txt"), str(notes / "del.txt"),
    ]  # fmt: skip
    twice = ("notes/del.txt", notes / "del.txt")
    assert rag("delete", *twice)[:2] == (0, "1 documents and 1 chunks deleted\n")
    assert len(rag("list")[1].splitlines()) == 1


def test_a_document_that_is_named_twice_is_one(rag, notes):
    status, out, _ = rag("add", "notes/del.txt", notes / "del.txt", "notes/../notes/del.txt")
    assert (status, out) == (0, "1 documents in 1 chunks\n")


def test_json_is_lines_of_json(rag):
    added = json.loads(rag("add", "notes/del.txt", "--json")[1])
    assert added.keys() == {"documents", "chunks"}
    [chunk] = added["chunks"]
    answer = json.loads(rag("ask", FACTS[1].question, "--chunk", chunk, "--json")[1])
    assert answer["text"].strip().startswith(FACTS[1].value)
    assert answer["citations"][0]["chunk"] == chunk
    assert answer["stats"]["blend"]["chunks"] == 1
    assert answer["ttft_s"] > 0
    [listed] = [json.loads(line) for line in rag("list", "--json")[1].splitlines()]
    assert listed["chunks"] == [chunk]
    assert json.loads(rag("delete", listed["id"], "--json")[1]) == {
        "documents": [listed["id"]], "chunks": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["add", "nobody.txt"], 1, "cannot read nobody.txt: No such file"),
        (["add", ""], 1, "a path is empty"),
        (["add", "notes/empty.txt"], 1, "is empty: nothing was added"),
        (["add", "notes/picture.png"], 1, "is not UTF-8 text"),
        (["ask", "What?"], 1, "there are no documents yet: add some"),
        (["ask", "What?", "--chunk", "nobody"], 1, "there is no chunk 'nobody'"),
        (["ask", "What?", "--top-k", "3"], 1, "use --top-p, or --chunks"),
        (["ask", "What?", "--chunks", "0"], 1, "--chunks is a number from 1 up, got 0"),
        (["ask", "What?", "--policy", "best"], 1, "policy must be one of"),
        (["ask", "What?", "--chunks", "2", "--chunk", "x"], 2, "not allowed with"),
        (["delete", "nobody"], 1, "there is no document"),
        (["list", "--no-store"], 1, "leave --no-store out"),
        (["list", "--chunk-tokens", "0"], 1, "chunk_tokens = 0"),
        (["list", "--method", "quest"], 2, "unrecognized arguments: --method"),
    ],
)
def test_mistakes_are_told_in_one_line(rag, args, status, said):
    got, out, err = rag(*args)
    assert (got, out) == (status, "")
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


def test_every_action_has_help(rag):
    for action in ("add", "ask", "list", "delete"):
        status, out, err = rag(action, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(f"usage: headrace rag {action}")


# the demo


def test_the_demo_answers_in_another_order_from_disk_in_a_new_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "demo", "rag", "--tokens", "2048", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["questions"] == shown["correct_first"] == shown["correct_second"] == 5
    assert shown["documents"] == 5
    parts = ("exact_tokens", "reused_tokens", "fresh_tokens")
    assert sum(shown[part] for part in parts) == shown["prompt_tokens"]
    assert shown["reused_tokens"] > 1000
    assert shown["disk_reads"] > 0
    assert shown["ttft_s"] > 0


def outcome(order, *, missed=0, reads=1) -> demo_rag.Outcome:
    answer = demo_rag.Answer(
        key="tiger", value="1", text="1", right=True, order=order, ttft_s=0.1, full_s=0.2,
        prompt_tokens=3, exact_tokens=1, reused_tokens=1, fresh_tokens=1, charged=0.2,
        missed=missed, reason="load",
    )  # fmt: skip
    return demo_rag.Outcome(2, 2, 0.1, [answer], reads, 100)


def test_the_demo_does_not_show_what_did_not_happen():
    demo_rag.check(outcome(["a", "b"]), outcome(["b", "a"]))
    with pytest.raises(DemoError, match="in the same order"):
        demo_rag.check(outcome(["a", "b"]), outcome(["a", "b"]))
    for second in (outcome(["b", "a"], missed=1), outcome(["b", "a"], reads=0)):
        with pytest.raises(DemoError, match="that was no reuse"):
            demo_rag.check(outcome(["a", "b"]), second)


def test_an_impossible_demo_is_told_in_one_line(capsys):
    assert main(["demo", "rag", "--facts", "0"]) == 1
    assert "process 1 failed: --facts must be 2 to" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_second_process_of_the_demo_never_reads_in_the_order_of_the_first(count):
    kept = [Document(str(i), "", ()) for i in range(count)]
    for seed in range(20):
        job = demo_rag.Job("m", EngineConfig(), 2048, count, seed, add=True)
        first, second = (
            [one.id for one in ordered(replace(job, add=add), FACTS[0], kept)]
            for add in (True, False)
        )
        assert sorted(first) == sorted(second) == [one.id for one in kept]
        assert first != second
