"""Suites and measurements by name."""

import pytest

from engine.errors import ConfigError
from evals import registry
from tests.evals.toy import settings


def test_bare_measurements_are_of_needles():
    assert registry.parse("speed") == ("needle", "speed")
    assert registry.parse("fidelity:ruler") == ("ruler", "fidelity")
    assert registry.parse("ruler") == ("ruler", None)


@pytest.mark.parametrize(
    "name", ["needle", "multiturn", "extraction", "ruler", "rag", "longbench", "longbench-v2"]
)
def test_every_suite_can_be_made_and_says_its_tasks(name):
    suite = registry.make_suite(name, settings())
    assert suite.tasks


def test_the_text_of_a_haystack_is_given_to_suites(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        registry.make_suite("ruler", settings(haystack=str(tmp_path / "nowhere")))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="UTF-8"):
        registry.make_suite("ruler", settings(haystack=str(tmp_path / "latin")))


def test_data_that_a_suite_looks_for_by_itself_is_hashed_too(tmp_path, monkeypatch):
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "dev.json").write_text("{}")
    monkeypatch.setenv("HEADRACE_DATA", str(tmp_path))
    found = registry.data_digests(["ruler"], settings(hotpotqa="hub/name"))
    assert len(found["squad"]) == 64
    assert found["hotpotqa"] == "hub/name"
    (tmp_path / "squad" / "dev.json").rename(tmp_path / "squad" / "test.json")
    assert registry.data_digests(["ruler"], settings())["squad"] != found["squad"]


def test_a_suite_that_there_is_not_is_named():
    with pytest.raises(ConfigError, match="no suite 'rulers'; there are needle, "):
        registry.make_suite("rulers", settings())
