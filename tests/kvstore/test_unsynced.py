"""Power cuts, made from a recorded log of writes to both files: none ever yields a wrong KV."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kvstore.unsynced import LOST, REFUSED, RIGHT, WRONG

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    not COMPILER or sys.platform != "linux",
    reason="the write recorder needs a C compiler and LD_PRELOAD",
)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    library = tmp_path_factory.mktemp("recorder") / "write_log.so"
    source = HERE / "write_log.c"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([COMPILER, *flags, "-o", library, source, "-ldl"], check=True)
    return library


def script(*args, **env):
    command = [sys.executable, "-m", "tests.kvstore.unsynced", *map(str, args)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": "."} | env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def outcomes(recorder, folder, blocks, images, seed):
    log = folder / "log"
    log.touch()
    script("write", folder / "store", blocks, LD_PRELOAD=str(recorder), WRITE_LOG=str(log))
    (folder / "images").mkdir()
    seen = json.loads(script("replay", log, folder / "images", blocks, images, seed))
    assert [count >= 10 for count in seen["syncs"]] == [True] * 2  # of data.mdb, and of the values
    assert seen["operations"] > 150
    return seen


@pytest.mark.parametrize("blocks", [1000, 15], ids=["all fit", "most evicted"])
def test_after_a_power_cut_nothing_acknowledged_is_lost_and_nothing_is_wrong(
    recorder, tmp_path, blocks
):
    seen = outcomes(recorder, tmp_path, blocks, images=20, seed=blocks)
    assert seen["honest"].keys() <= {str(RIGHT)}
    # a disk that lies may cost blocks or the store, but never yields a wrong one or a crash
    assert seen["lying"].keys() <= {str(RIGHT), str(REFUSED)}
    assert not {str(WRONG), str(LOST)} & seen["lying"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [1000, 15])
def test_after_many_power_cuts_nothing_is_wrong(recorder, tmp_path, blocks, seed):
    seen = outcomes(recorder, tmp_path, blocks, images=1500, seed=seed)
    assert seen["honest"].keys() <= {str(RIGHT)}
    assert seen["lying"].keys() <= {str(RIGHT), str(REFUSED)}
