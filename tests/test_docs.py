"""What the documents say, runs: their code blocks, and what those print."""

import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from engine.config import EngineConfig
from tests.caches import own_cache

ROOT = Path(__file__).parents[1]
DOCS = sorted(ROOT.glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)


def blocks():
    for doc in DOCS:
        for number, found in enumerate(BLOCK.finditer(doc.read_text())):
            yield pytest.param(*found.groups(), id=f"{doc.name}-{number}")


NAMED = [f"engine/{name}" for name in ("model", "sparse", "batch", "blend", "rag", "service")]
NAMED += ["kvstore/disk", "kvstore/pool"]


@pytest.mark.parametrize(("language", "code", "printed"), list(blocks()))
def test_a_code_block_runs_and_prints_what_the_document_shows(tmp_path, language, code, printed):
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
    settings = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(own_cache(tmp_path / "cache")),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if printed is not None:
        assert done.stdout.strip() == printed.strip()


def test_the_settings_that_the_readme_shows_are_the_defaults_and_its_examples_are_read(tmp_path):
    (shown,) = re.findall(r"^```toml\n(.*?)^```\n", (ROOT / "README.md").read_text(), re.M | re.S)
    file = tmp_path / "config.toml"
    file.write_text(shown)
    assert EngineConfig.from_toml(file) == EngineConfig()
    file.write_text(re.sub("^# ", "", shown, flags=re.M))
    config = EngineConfig.from_toml(file)
    assert config.serve.keys["alice"].key_env == "ALICE_KEY"
    assert config.store.remote.url.startswith("redis://")


def test_no_document_has_a_gap_to_be_filled():
    for doc in DOCS:
        assert not re.findall(r"@[A-Z]+@|TODO|TBD", doc.read_text()), doc.name


def test_every_file_a_document_links_to_is_there():
    for doc in DOCS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", doc.read_text()):
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}"


def test_the_listing_of_the_architecture_names_every_file():
    listing = (ROOT / "ARCHITECTURE.md").read_text().split("```text\n")[2].split("```")[0]
    for package in re.split(r"^(?=\w)", listing, flags=re.M)[1:]:
        folder, said = ROOT / package.split("/")[0], re.findall(r"[\w*]+/?", package)
        there = {x.stem for x in folder.glob("*.py")} - {"__init__"}
        there |= {f"{x.name}/" for x in folder.iterdir() if next(x.glob("*.py"), None)}
        missing = [name for name in there if not any(fnmatch(name, word) for word in said)]
        assert not missing, f"{folder.name}: {sorted(missing)}"


@pytest.mark.parametrize("folder", NAMED)
def test_the_listing_names_every_file_of_a_folder_that_it_goes_into(folder):
    listing = (ROOT / "ARCHITECTURE.md").read_text().split("```text\n")[2].split("```")[0]
    entry = re.split(rf"^ +{folder.split('/')[1]}/", listing, flags=re.M)[1]
    said = re.findall(r"\w+", re.split(r"^.{11}\w+/", entry, maxsplit=1, flags=re.M)[0])
    there = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert there
    assert there <= set(said), sorted(there - set(said))


def test_every_script_a_document_names_is_there():
    for doc in DOCS:
        for name in re.findall(r"scripts/[\w.]+\b", doc.read_text()):
            assert (ROOT / name.rstrip(".")).exists(), f"{doc.name} names {name}"


def test_the_benchmark_tables_are_those_of_the_results():
    table = ROOT / "scripts" / "bench_table.py"
    assert subprocess.run([sys.executable, str(table), "--check"], check=False).returncode == 0


def test_the_licence_and_the_notice_of_what_is_others_come_along():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(project["license-files"]) == ["LICENSE", "NOTICE"]
