"""The catalogue: what was added is there, what was removed is nowhere, whoever else writes."""

import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.rag.catalogue import (
    Catalogue,
    CatalogueError,
    Chunk,
    Document,
    Origin,
    Trace,
    catalogues,
    discard,
)

ROOT = Path(__file__).parents[3]
HERE = Origin((1, 2), 64)
WORDS = {"a": "alpha", "b": "beta", "c": "gamma", "d": "delta"}


def document(id_: str, chunks: str) -> Document:
    made = tuple(Chunk(c, WORDS.get(c, c), tuple(c.encode())) for c in chunks)
    return Document(id_, f"title of {id_}", made)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "rag.jsonl"


def filled(path) -> Catalogue:
    catalogue = Catalogue(path)
    catalogue.add([document("one", "ab"), document("two", "bc")], HERE)
    return catalogue


def state(catalogue: Catalogue):
    named = (catalogue.documents, catalogue.chunks, catalogue.owners)
    sets = (catalogue.origins, catalogue.doomed, catalogue.traces)
    return (*map(dict, named), *map(set, sets))


IN_MEMORY_AND_ON_DISK = pytest.mark.parametrize("kept", [False, True])


@IN_MEMORY_AND_ON_DISK
def test_documents_their_chunks_and_who_has_them(path, kept):
    catalogue = filled(path if kept else None)
    assert list(catalogue.documents) == ["one", "two"]
    assert catalogue.documents["one"].tokens == 2
    assert {id_: chunk.text for id_, chunk in catalogue.chunks.items()} == {
        "a": "alpha", "b": "beta", "c": "gamma",
    }  # fmt: skip
    owners = {id_: tuple(having) for id_, having in catalogue.owners.items()}
    assert owners == {"a": ("one",), "b": ("one", "two"), "c": ("two",)}
    assert list(catalogue.origins) == [HERE]
    assert path.exists() == kept


def test_another_process_finds_the_same(path):
    catalogue = filled(path)
    catalogue.remove(["one"])
    assert state(Catalogue(path)) == state(catalogue)


@IN_MEMORY_AND_ON_DISK
def test_a_removed_documents_own_chunks_are_doomed_until_they_are_settled(path, kept):
    catalogue = filled(path if kept else None)
    catalogue.remove(["one", "unknown"])
    assert list(catalogue.documents) == ["two"]
    assert list(catalogue.chunks) == ["b", "c"]
    assert [doomed.tokens for doomed in catalogue.doomed.values()] == [tuple(b"a")]
    catalogue.settle(["a"])
    assert not catalogue.doomed


@IN_MEMORY_AND_ON_DISK
def test_traces_are_kept_until_they_are_settled(path, kept):
    catalogue, first, second = filled(path if kept else None), Trace("a", "00"), Trace("b", "01")
    catalogue.note([first, second])
    size = path.stat().st_size if kept else 0
    catalogue.note([first])
    assert not kept or path.stat().st_size == size
    catalogue.settle(traces=[second])  # the chunk is there: it may have come again
    assert list(catalogue.traces) == [first, second]
    catalogue.settle(evicted=[first])
    assert list(catalogue.traces) == [second]

    assert not kept or state(Catalogue(path)) == state(catalogue)


def test_no_text_of_a_removed_document_stays_in_the_folder(path):
    catalogue = filled(path)
    path.with_suffix(".new").write_text("alpha, of a process that was killed")
    catalogue.remove(["one"])
    left = {file.name: file.read_text() for file in path.parent.iterdir()}
    assert left.keys() == {"rag.jsonl", "rag.lock"}
    assert "alpha" not in "".join(left.values())
    assert "beta" in left["rag.jsonl"]


def test_all_catalogues_of_a_folder_are_found_and_discarded_whole(tmp_path):
    filled(tmp_path / "rag-1.jsonl")
    (tmp_path / "rag-2.new").write_text("alpha, of a process that was killed")
    found = catalogues(tmp_path)
    assert found == [tmp_path / "rag-1.jsonl", tmp_path / "rag-2.jsonl"]
    for path in found:
        discard(path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".lock"}


@IN_MEMORY_AND_ON_DISK
def test_a_document_takes_the_place_of_the_one_with_its_id(path, kept):
    catalogue = filled(path if kept else None)
    catalogue.add([document("one", "bd"), document("three", "c")], HERE)
    assert catalogue.documents["one"] == document("one", "bd")
    assert list(catalogue.doomed) == ["a"]
    assert tuple(catalogue.owners["b"]) == ("two", "one")
    if kept:
        assert "alpha" not in path.read_text()
        assert state(Catalogue(path)) == state(catalogue)


def test_a_doomed_chunk_that_comes_again_lives(path):
    catalogue = filled(path)
    catalogue.remove(["one"])
    catalogue.add([document("four", "a")], HERE)
    assert not catalogue.doomed
    assert not Catalogue(path).doomed


def test_adding_the_same_again_writes_nothing(path):
    catalogue = filled(path)
    before = path.read_bytes()
    catalogue.add([document("one", "ab")], HERE)
    catalogue.remember(HERE)
    assert path.read_bytes() == before


def test_new_documents_are_appended(path):
    catalogue = filled(path)
    before, number = path.read_bytes(), path.stat().st_ino
    catalogue.add([document("three", "d")], Origin((3,), 64))
    assert path.read_bytes().startswith(before)
    assert path.stat().st_ino == number


def test_what_others_change_is_learned(path):
    ours, theirs = filled(path), Catalogue(path)
    theirs.add([document("three", "d")], HERE)
    ours.refresh()
    assert list(ours.documents) == ["one", "two", "three"]
    theirs.remove(["one"])
    theirs.add([document("five", "d")], HERE)
    ours.refresh()
    assert state(ours) == state(theirs)
    ours.add([document("six", "a")], HERE)  # knows of the other's rows without being told
    theirs.add([document("seven", "a")], HERE)
    assert list(theirs.documents) == ["two", "three", "five", "six", "seven"]


def test_a_file_that_somebody_deleted_is_empty(path):
    catalogue = filled(path)
    path.unlink()
    catalogue.refresh()
    assert not catalogue.documents
    catalogue.add([document("new", "d")], HERE)
    assert list(Catalogue(path).documents) == ["new"]


def test_only_the_owner_may_read_it(path):
    filled(path).remove(["one"])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_line_cut_off_by_a_kill_is_ignored_and_overwritten(path):
    filled(path)
    whole = path.read_bytes()
    for cut in range(1, 60, 7):
        path.write_bytes(whole[:-cut])
        catalogue = Catalogue(path)
        assert list(catalogue.documents) == ["one"]
        catalogue.add([document("two", "bc")], HERE)
        assert list(Catalogue(path).documents) == ["one", "two"]


def test_nothing_of_a_line_that_was_cut_off_stays_behind_the_next(path):
    catalogue = filled(path)
    path.write_bytes(path.read_bytes() + b'{"type":"document","text":"' + b"alpha" * 1000)
    catalogue.add([document("three", "d")], HERE)
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda data: data.replace(b'"text"', b'"tixt"', 1),
            "is damaged .*add the documents again",
        ),
        (lambda data: data.replace(b"alpha", b"al\xffpha", 1), "is damaged"),
        (lambda data: data.replace(b'"version":1', b'"version":2', 1), "no catalogue of version 1"),
        (lambda data: b"", "is damaged"),
        (lambda data: data.split(b"\n", 1)[1], "no catalogue of version 1"),
    ],
)
def test_a_damaged_file_is_refused(path, damage, said):
    filled(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CatalogueError, match=said):
        Catalogue(path)


def test_a_file_that_is_cut_while_it_is_open_is_read_anew_and_not_filled_up(path):
    catalogue = filled(path)
    path.write_bytes(path.read_bytes()[:-40])
    catalogue.refresh()
    assert list(catalogue.documents) == ["one"]
    path.write_bytes(path.read_bytes()[:-40])
    catalogue.add([document("three", "d")], HERE)
    assert state(catalogue) == state(Catalogue(path))
    assert list(catalogue.documents) == ["one", "three"]


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogueError, match=r"cannot read .*Not a directory"):
        Catalogue(tmp_path / "file" / "rag.jsonl")


def test_what_could_not_be_written_is_not_known(path, monkeypatch):
    catalogue = filled(path)

    def full(handle):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    for new in (document("one", "cd"), document("three", "d")):
        with pytest.raises(CatalogueError, match=r"cannot write .*No space left"):
            catalogue.add([new], HERE)
        left = {file.name: file.stat().st_size for file in path.parent.iterdir()}
        assert left == {"rag.jsonl": len(before), "rag.lock": 0}  # nothing that fills the disk
        assert path.read_bytes().splitlines()[1:] == before.splitlines()[1:]
    monkeypatch.undo()
    catalogue.refresh()
    assert catalogue.documents["one"] == document("one", "ab")


def test_who_read_what_could_not_be_written_reads_anew(path, monkeypatch):
    catalogue = filled(path)
    other = Catalogue(path)

    def full(handle):
        other.refresh()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CatalogueError, match="No space left"):
            catalogue.add([document("three", "d")], HERE)
    assert "three" in other.documents
    catalogue.add([document("four", "dddd"), document("five", "d")], HERE)  # goes on further
    other.refresh()
    assert state(other) == state(catalogue)
    assert list(other.documents) == ["one", "two", "four", "five"]


def test_a_change_that_is_interrupted_was_none(path, monkeypatch):
    catalogue = filled(path)

    def interrupted(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            catalogue.remove(["one"])
    catalogue.refresh()
    assert state(catalogue) == state(Catalogue(path))
    assert "one" in catalogue.documents


def test_threads_with_catalogues_of_their_own_lose_nothing(path):
    def work(number):
        catalogue = Catalogue(path)
        for i in range(15):
            catalogue.add([document(f"{number}-{i}", f"{number}{i % 10}")], HERE)
            if i % 5 == 4:
                catalogue.remove([f"{number}-{i}"])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {f"{n}-{i}" for n in range(4) for i in range(15) if i % 5 != 4}
    assert Catalogue(path).documents.keys() == expected


WRITER = """
import sys
from pathlib import Path
from engine.rag.catalogue import Catalogue, Chunk, Document, Origin
catalogue, name = Catalogue(Path(sys.argv[1])), sys.argv[2]
for i in range(int(sys.argv[3])):
    chunk = Chunk(f"{name}-{i}", "text " * 200, (1, 2))
    catalogue.add([Document(f"{name}-{i}", "", (chunk,))], Origin((), 64))
    if i % 3 == 2:
        catalogue.remove([f"{name}-{i - 1}"])
    print(i, flush=True)
"""


def writer(path, name, count) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )


def test_two_processes_add_and_remove_at_once(path):
    both = [writer(path, name, 30) for name in ("x", "y")]
    assert [process.communicate() and process.returncode for process in both] == [0, 0]
    expected = {f"{name}-{i}" for name in "xy" for i in range(30) if i % 3 != 1}
    assert Catalogue(path).documents.keys() == expected


def test_a_killed_process_leaves_a_readable_catalogue(path):
    rng = random.Random(0)
    for number in range(3):
        process = writer(path, f"run{number}", 10_000)
        acknowledged = [int(process.stdout.readline()) for _ in range(rng.randrange(5, 40))]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = Catalogue(path).documents
        kept = [i for i in acknowledged if i % 3 != 1]
        assert all(f"run{number}-{i}" in found for i in kept)
        Catalogue(path).add([document(f"after {number}", "a")], HERE)


@IN_MEMORY_AND_ON_DISK
def test_a_document_may_have_a_chunk_twice_in_other_words(path, kept):
    """Tokenizers that normalize make the same tokens of both."""
    catalogue = Catalogue(path if kept else None)
    twice = (Chunk("a", "caf\u00e9", (1, 2)), Chunk("a", "cafe\u0301", (1, 2)))
    for _ in range(2):  # and in its own place
        catalogue.add([Document("menu", "", twice)], HERE)
    assert catalogue.owners == {"a": {"menu": twice[0]}}
    catalogue.remove(["menu"])
    assert not catalogue.documents
    assert list(catalogue.doomed) == ["a"]


def test_a_chunk_that_many_documents_have_is_not_compared_with_each_of_them():
    compared = []

    class Id(str):
        def __ne__(self, other: object) -> bool:
            compared.append(other)
            return str.__ne__(self, other)

        def __eq__(self, other: object) -> bool:
            compared.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    catalogue = Catalogue(None)
    catalogue.add([document(Id(number), "a") for number in range(100)], HERE)
    catalogue.remove([str(number) for number in range(50)])
    assert len(catalogue.owners["a"]) == 50
    assert len(compared) < 1000
