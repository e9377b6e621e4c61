"""The folder of a run: says how it was made, and takes nothing that was made otherwise."""

import hashlib
import json

import pytest

from engine.engine import Engine
from engine.errors import ConfigError
from evals import registry
from evals.folder import RUN, facts, open_folder
from evals.record import Journal, Record
from evals.registry import haystack_text
from evals.run import plan
from tests.evals import toy
from tests.evals.toy import settings


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(registry.SUITES, "toy", toy.KIND)
    monkeypatch.delenv("HEADRACE_DATA", raising=False)


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("needle-tiny", device="cpu") as made:
        yield made


def test_a_folder_says_how_it_was_made(engine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A haystack.")
    made = facts(engine, settings(haystack=str(text)))
    open_folder(tmp_path, made).close()
    found = json.loads((tmp_path / RUN).read_bytes())
    assert found["model"] == "needle-tiny"
    assert found["settings"]["budget"] == [0.2]
    assert found["versions"]["torch"]
    assert found["hardware"]["device"]
    assert len(found["weights"]) == len(found["tokenizer"]) == 64
    [start] = found["starts"]
    assert start["commit"] == found["commit"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(budget=(0.1,)), r"budget is \[0.1\], was \[0.2\]"),
        (dict(seed=7), "seed is 7, was 42"),
        (dict(limit=3, lengths=(300,)), r"lengths is \[300\], was \[200\]; limit is 3, was 2"),
        (dict(model="needle-smear"), "weights is"),
    ],
)
def test_a_folder_of_another_run_is_refused_in_one_line(engine, tmp_path, changes, said):
    open_folder(tmp_path, facts(engine, settings())).close()
    made = facts(engine, settings(**changes))
    if made["model"] != "needle-tiny":
        made |= {"weights": "other"}
    with pytest.raises(ConfigError, match=said) as error:
        open_folder(tmp_path, made)
    assert "\n" not in str(error.value)
    assert "starts" not in str(error.value)
    open_folder(tmp_path, facts(engine, settings())).close()  # it is as it was, and free


def test_memory_may_be_given_later(engine, tmp_path):
    open_folder(tmp_path, facts(engine, settings())).close()
    open_folder(tmp_path, facts(engine, settings(pinned_bytes=1 << 30))).close()


def test_other_data_under_the_same_name_is_another_run(engine, tmp_path, monkeypatch):
    kind = registry.Kind("tests.evals.toy", "ToySuite", ("seed", "haystack"))
    monkeypatch.setitem(registry.SUITES, "toy", kind)
    text, copy = tmp_path / "text.txt", tmp_path / "copy.txt"
    text.write_text("One.")
    copy.write_text("One.")
    open_folder(tmp_path, facts(engine, settings(haystack=str(text)))).close()
    open_folder(tmp_path, facts(engine, settings(haystack=str(copy)))).close()
    text.write_text("Two.")
    with pytest.raises(ConfigError, match="data haystack is"):
        open_folder(tmp_path, facts(engine, settings(haystack=str(text))))


def test_another_haystack_is_another_run_the_default_one_too(engine, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("One.")
    usual, other = (settings(suite=("needle",), haystack=x) for x in (None, str(text)))
    for folder, first, then in (("a", usual, other), ("b", other, usual)):
        open_folder(tmp_path / folder, facts(engine, first)).close()
        with pytest.raises(ConfigError, match=r"data haystack is .*, was .*its text is another"):
            open_folder(tmp_path / folder, facts(engine, then))
    monkeypatch.setattr("evals.registry.default_text", lambda: "Of another release of Python.")
    with pytest.raises(ConfigError, match="data haystack is"):
        open_folder(tmp_path / "a", facts(engine, usual))


def test_a_run_from_before_haystacks_were_noted_had_the_default_one(engine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One.")
    usual, other = (settings(suite=("needle",), haystack=x) for x in (None, str(text)))
    made = facts(engine, usual)
    open_folder(tmp_path, made | {"data": {}}).close()
    with pytest.raises(ConfigError, match="data haystack is"):
        open_folder(tmp_path, facts(engine, other))
    open_folder(tmp_path, made).close()
    assert json.loads((tmp_path / RUN).read_bytes())["data"] == made["data"]


def test_the_digest_of_a_haystack_is_that_of_the_text_that_was_read(engine, tmp_path):
    pipe = tmp_path / "pipe"
    pipe.write_text("A text, read and gone.")
    asked = settings(suite=("needle", "ruler"), haystack=str(pipe))
    text = haystack_text(asked)
    pipe.write_text("")
    assert plan(asked, text)
    made = facts(engine, asked, text)
    assert made["data"]["haystack"] == hashlib.sha256(b"A text, read and gone.").hexdigest()


def test_data_that_was_missing_may_come_and_data_that_is_not_asked_for_does_not_matter(
    engine, tmp_path, monkeypatch
):
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "dev.json").write_text("{}")
    ruler = settings(suite=("ruler",))
    open_folder(tmp_path / "all", facts(engine, ruler)).close()
    needles = settings(suite=("ruler",), tasks=("niah_single_1",))
    open_folder(tmp_path / "needles", facts(engine, needles)).close()
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    open_folder(tmp_path / "all", facts(engine, ruler)).close()
    assert list(json.loads((tmp_path / "all" / RUN).read_bytes())["data"]) == ["haystack", "squad"]
    open_folder(tmp_path / "needles", facts(engine, needles)).close()
    assert list(json.loads((tmp_path / "needles" / RUN).read_bytes())["data"]) == ["haystack"]
    (tmp_path / "squad" / "dev.json").write_text("[]")
    with pytest.raises(ConfigError, match="data squad is"):
        open_folder(tmp_path / "all", facts(engine, ruler))


def test_a_start_says_where_and_by_what_and_other_words_are_another_run(engine, tmp_path):
    made = facts(engine, settings())
    open_folder(tmp_path, made).close()
    elsewhere = made | {"hardware": {"device": "another"}}
    open_folder(tmp_path, elsewhere).close()
    starts = json.loads((tmp_path / RUN).read_bytes())["starts"]
    assert starts[1]["hardware"] == {"device": "another"}
    assert starts[0]["versions"] == made["versions"]
    other = made | {"versions": made["versions"] | {"wonderwords": "0.0"}}
    with pytest.raises(ConfigError, match=r'words of wonderwords is "0\.0"'):
        open_folder(tmp_path, other)


def test_records_without_a_word_how_they_were_made_are_refused(engine, tmp_path):
    journal = Journal(tmp_path)
    journal.add(
        [
            Record(
                id="a",
                suite="s",
                task="t",
                family="f",
                length=1,
                turn=0,
                method="dense",
                budget=None,
            )
        ]
    )
    journal.close()
    with pytest.raises(ConfigError, match=r"no run\.json"):
        open_folder(tmp_path, facts(engine, settings()))


@pytest.mark.parametrize("found", ['{"a": 1}', "[]", '{"settings": 1}', "x", ""])
def test_a_folder_of_another_tool_is_refused_and_left_alone(engine, tmp_path, found):
    (tmp_path / RUN).write_text(found)
    with pytest.raises(ConfigError, match="does not say how the run was made"):
        open_folder(tmp_path, facts(engine, settings()))
    assert (tmp_path / RUN).read_text() == found
