"""Documents as people have them: what becomes of each kind, and what is refused."""

import pytest

from engine import PromptError
from engine.rag.documents import chunk_id, files, read
from engine.splitter import Piece


def cut(text: str, title: str) -> list[Piece]:
    """One piece a word."""
    return [Piece(word, tuple(f"{title} {word}".encode())) for word in text.split()]


def test_a_text_has_its_hash_for_a_name_and_a_record_its_own():
    plain, named, half = read(
        ["one two", {"id": "x", "title": "T", "text": "three"}, {"text": "4"}], cut
    )
    assert (len(plain.id), plain.title) == (16, "")
    assert [chunk.text for chunk in plain.chunks] == ["one", "two"]
    assert (named.id, named.title) == ("x", "T")
    assert len(half.id) == 16
    assert plain.id == read("one two", cut)[0].id != read("one  two", cut)[0].id


def test_the_same_twice_is_one():
    assert len(read(["one", "one", {"id": "x", "text": "y"}, {"id": "x", "text": "y"}], cut)) == 2


def test_a_chunks_id_follows_from_its_tokens():
    [same], [other] = read({"text": "one"}, cut), read({"text": "one", "title": "T"}, cut)
    assert same.chunks[0].id == chunk_id(same.chunks[0].tokens) != other.chunks[0].id
    assert len(same.chunks[0].id) == 32


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("  ", "is empty: nothing was added"),
        ([{"id": "x", "text": "1"}, {"id": "x", "text": "2"}], "two documents have the id 'x'"),
        ({"id": "x"}, "a document needs a 'text'"),
        ({"id": "x", "text": "y", "url": "z"}, "a document has id, text, title, not 'url'"),
    ],
)
def test_a_document_of_another_form_is_refused(source, said):
    with pytest.raises(PromptError, match=said):
        read(source, cut)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(PromptError, match=r"cannot read .*nobody.txt: No such file"):
        read(tmp_path / "nobody.txt", cut)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="is not UTF-8 text: convert it first"):
        read(tmp_path / "bytes", cut)


def test_a_folder_has_all_files_but_hidden_ones(tmp_path):
    for name in ("b.txt", "a/c.md", ".git/config", "a/.d", "empty/.keep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [str(path.relative_to(tmp_path)) for path in files(tmp_path)] == ["a/c.md", "b.txt"]
    with pytest.raises(PromptError, match="there is no file in"):
        files(tmp_path / "empty")
