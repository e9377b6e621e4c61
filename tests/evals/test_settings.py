"""Settings of a run: from a file, from options, and what is wrong with them in words."""

import pytest

from engine.errors import ConfigError
from evals.settings import RunSettings, read_settings, tokens


def test_options_go_before_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'suite = ["toy"]\nlengths = ["4k", 300]\nbudget = [64, 0.1]\nlimit = 3\n'
        "[settings.shadowkv]\nrank = 8\n"
    )
    read = read_settings(str(path), {"limit": 5, "method": ["dense", "shadowkv"]})
    assert read == RunSettings(
        suite=("toy",),
        lengths=(4096, 300),
        budget=(64.0, 0.1),
        limit=5,
        method=("dense", "shadowkv"),
        settings={"shadowkv": {"rank": 8}},
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sute = 3", "unknown field `sute`; known settings: model, suite"),
        ('suite = ["toy"]\nlimit = "x"', "limit"),
        ('suite = ["toy"]\nlengths = ["4x"]', "got 4x"),
        (f'suite = ["toy"]\nlengths = [{10**30}]', "up to 16,777,216; got 1000"),
        ('suite = ["toy"', "is not TOML"),
        ("suite = " + "[" * 9999, "is not TOML: maximum recursion depth"),
        ("", "suite is missing"),
        ('suite = ["toy"]\nhaystack = "\\u0000"', "haystack must name a file"),
        ('suite = ["toy"]\nsquad = ""', "squad must name a file"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_settings(str(path), {})


def test_a_file_is_utf_8_wherever_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "latin-1")
    path = tmp_path / "run.toml"
    path.write_text('suite = ["toy"]\nhaystack = "B\u00fccher.txt"\n', encoding="utf-8")
    assert read_settings(str(path), {}).haystack == "B\u00fccher.txt"


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.toml"):
        read_settings("nowhere.toml", {})


@pytest.mark.parametrize(("said", "want"), [("4k", 4096), ("4K", 4096), (300, 300), ("17", 17)])
def test_lengths_are_read_as_people_write_them(said, want):
    assert tokens(said) == want
