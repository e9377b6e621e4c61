"""What a result says about where it comes from is so."""

import subprocess

import pytest

from evals import facts


@pytest.mark.parametrize("place", [".", ".venv/lib"])
def test_the_commit_is_that_of_our_own_checkout(tmp_path, monkeypatch, place):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=one", "-c", "user.email=one@example.org")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    monkeypatch.setattr(facts, "ROOT", tmp_path / place)
    assert (facts.commit() != "unknown") == (place == ".")
