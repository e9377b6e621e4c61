"""Documents and models on the wire."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Model

from engine.serve.refusals import Refusal
from engine.serve.wire_documents import (
    DocumentDeleted,
    DocumentObject,
    Health,
    ModelList,
    ModelObject,
    Page,
    page_of,
    parse_documents,
    parse_page,
)


def parsed(documents):
    return parse_documents(json.dumps({"documents": documents}).encode())


def refused(parse, value):
    with pytest.raises(Refusal) as caught:
        parse(value)
    assert caught.value.status == 400
    return caught.value.fault


def test_documents_are_texts_with_ids_and_titles():
    one, two = parsed([{"text": "a", "id": "x-1.b:c_d", "title": "T"}, {"text": "b"}]).documents
    assert (one.text, one.id, one.title) == ("a", "x-1.b:c_d", "T")
    assert (two.text, two.id, two.title) == ("b", None, None)


@pytest.mark.parametrize("bad", ["", "a/b", "..", ".a", "a b", "a\n", "ä", "x" * 129, "-", 5])
def test_an_id_that_a_path_would_change_is_refused(bad):
    assert refused(parsed, [{"text": "a", "id": bad}]).param == "documents[0].id"


@pytest.mark.parametrize(
    ("documents", "param"),
    [
        ([], "documents"), ("a", "documents"), ([{}], "documents[0].text"),
        ([{"text": ""}], "documents[0].text"), ([{"text": "a", "x": 1}], "documents[0].x"),
        (["a"], "documents[0]"), ([{"text": "a"}] * 1001, "documents"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "documents"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_documents_is_refused(documents, param):
    assert refused(parsed, documents).param == param


def test_a_page_is_asked_for_by_limit_and_id():
    assert parse_page({}) == Page(limit=100, after=None)
    assert parse_page({"limit": "7", "after": "x", "other": "1"}) == Page(limit=7, after="x")


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "", "1.5", "٣", " 5", "1_0", "9" * 999])
def test_a_limit_that_is_none_is_refused(limit):
    assert refused(parse_page, {"limit": limit}).param == "limit"


def some(count):
    return [DocumentObject(id=str(n), title="", chunks=["c"], tokens=n) for n in range(count)]


@given(count=st.integers(0, 12), limit=st.integers(1, 5))
def test_pages_add_up_to_the_whole(count, limit):
    documents, after, seen = some(count), None, []
    while True:
        page = page_of(documents, Page(limit=limit, after=after))
        assert len(page.data) <= limit
        assert (page.first_id, page.last_id) == (
            (page.data[0].id, page.data[-1].id) if page.data else (None, None)
        )
        seen += page.data
        after = page.last_id
        if not page.has_more:
            break
    assert seen == documents


def test_a_page_behind_nothing_is_refused():
    with pytest.raises(Refusal, match="'after' is the id of a document, got 'x'"):
        page_of(some(2), Page(after="x"))


def test_objects_say_what_they_are():
    (document,) = some(1)
    assert msgspec.to_builtins(document) == {
        "id": "0", "object": "document", "title": "", "chunks": ["c"], "tokens": 0,
    }  # fmt: skip
    assert msgspec.to_builtins(DocumentDeleted(id="x")) == {
        "id": "x", "object": "document.deleted", "deleted": True,
    }  # fmt: skip
    model = msgspec.to_builtins(ModelList(data=[ModelObject(id="m", created=5)]))["data"][0]
    assert not Model.model_validate(model, strict=True).model_extra
    assert msgspec.json.encode(Health(status="ok")) == b'{"status":"ok"}'
