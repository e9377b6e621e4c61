"""Are LMDB's own pages sound? They carry no checksum, and LMDB follows a damaged one anywhere.

    python -m kvstore.disk.tables FOLDER

walks every page and every entry, and ends with 0, or with 1 and the reason. What a damaged page
does to the process that walks it is why this is one of its own: `check_tables` starts it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from kvstore.disk.environment import open_environment
from kvstore.disk.explained import START_ANEW
from kvstore.disk.sound import verify_file
from kvstore.errors import CorruptRecord, StoreError


def check_tables(path: Path) -> None:
    """Raise CorruptRecord if the store's tables cannot be trusted. Others may use it meanwhile."""
    command = [sys.executable, "-P", "-m", "kvstore.disk.tables", str(path)]
    home = str(Path(__file__).parents[2])
    found = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": found}  # these very packages, wherever we are
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode < 0:
        how = signal.Signals(-done.returncode).name
        raise CorruptRecord(f"the tables in {path} are damaged ({how} on reading); {START_ANEW}")
    if done.returncode:
        raise CorruptRecord((done.stderr.strip().splitlines() or ["no reason given"])[-1])


def main(path: Path) -> int:
    try:
        env = open_environment(path)
        with env.lmdb.begin(write=True):  # excludes writers; touches no page but the meta pages
            verify_file(path)
        with env.lmdb.begin(buffers=True) as txn:
            for _ in txn.cursor(env.entries).iternext(keys=True, values=False):
                pass
        env.close()
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
