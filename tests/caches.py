"""Cache folders of a test's own."""

from pathlib import Path

from native.folders import cache_folder

COMPILED = cache_folder() / "native"


def own_cache(folder: Path) -> Path:
    """A new `$XDG_CACHE_HOME` in `folder`, which has nothing but the code that all tests share.

    Every process would compile it anew otherwise, for seconds.
    """
    COMPILED.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "headrace").mkdir(parents=True)
    (folder / "headrace" / "native").symlink_to(COMPILED)
    return folder
