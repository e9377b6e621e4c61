"""Everything a model's KV depends on, as one digest."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from torch import Tensor

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Two models share KV only if all of this is equal.

    Args:
        weights: digest of the weights (`weights_digest` or `state_digest`).
        adapters: name and digest of each active adapter, in the order they apply.
        rope: canonical JSON of the rotary embedding (`canonical_json`).
        dtype: of the stored KV, a key of `DTYPES`.
        attention: canonical JSON of what else shapes KV: windows, scale, soft cap, query-key
            norm, and the version of our semantics.
    Raises:
        ValueError: for an unknown dtype, an empty weights digest or a size below one.
    """

    weights: bytes
    adapters: tuple[tuple[str, bytes], ...]
    rope: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    attention: str
    digest: bytes = field(init=False, repr=False, compare=False)  # 32 bytes

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights must be a digest, got no bytes: use weights_digest()")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "digest", sha256(_encode(self)).digest())

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def block_shape(self, size: int) -> tuple[int, int, int, int, int]:
        """The `L 2 Hk P D` of a block of `size` tokens."""
        return self.num_layers, 2, self.num_kv_heads, size, self.head_dim


def canonical_json(value: object) -> str:
    """The one spelling of `value` that goes into an identity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def weights_digest(files: Sequence[Path], *, cache: Path | None = None) -> bytes:
    """SHA-256 over the names and contents of weight files, in the order of their names.

    Args:
        cache: JSON file that remembers the digest of each file by path, inode, size and
            times of change, so that the second start reads no weights. A damaged one is rebuilt.
    Raises:
        ValueError: without files, or with two of the same name.
    """
    paths = sorted((Path(file).resolve() for file in files), key=lambda path: path.name)
    if not paths or len({path.name for path in paths}) < len(paths):
        raise ValueError(f"weights_digest needs files of different names, got {paths}")
    known = _load(cache)
    stamps = [_stamp(path) for path in paths]
    with ThreadPoolExecutor(min(4, len(paths))) as pool:
        contents = list(pool.map(lambda s, p: known.get(s) or _file_digest(p), stamps, paths))
    fresh = dict(zip(stamps, contents, strict=True))
    if cache is not None and not fresh.items() <= known.items():
        _save(cache, known | fresh)
    return _combine((path.name, bytes.fromhex(c)) for path, c in zip(paths, contents, strict=True))


def state_digest(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of their names.

    For a module: `state_digest([*m.named_parameters(), *m.named_buffers()])`.
    """
    return _combine(
        (f"{name} {tensor.dtype} {list(tensor.shape)}", _tensor_digest(tensor))
        for name, tensor in sorted(tensors, key=lambda pair: pair[0])
    )


def _encode(model: ModelIdentity) -> bytes:
    """JSON quotes every field, so no two identities have the same encoding."""
    fields = {
        "schema": "headrace identity 1",
        "weights": model.weights.hex(),
        "adapters": [[name, digest.hex()] for name, digest in model.adapters],
        "rope": model.rope,
        "dtype": model.dtype,
        "shape": [model.num_layers, model.num_kv_heads, model.head_dim],
        "attention": model.attention,
    }
    return canonical_json(fields).encode()


def _combine(parts: Iterable[tuple[str, bytes]]) -> bytes:
    whole = sha256()
    for name, digest in parts:
        encoded = name.encode()
        whole.update(len(encoded).to_bytes(4, "little") + encoded + digest)
    return whole.digest()


def _tensor_digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return sha256(flat.view(torch.uint8).numpy().data).digest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> str:
    stat = path.stat()
    times = stat.st_mtime_ns, stat.st_ctime_ns  # the second nobody can set, as cp -p does the first
    return json.dumps([str(path), stat.st_ino, stat.st_size, *times])


def _load(cache: Path | None) -> dict[str, str]:
    """What the cache file says; nothing if it is absent or damaged (it is then rewritten)."""
    try:
        known = json.loads(cache.read_text()) if cache else {}
        return {stamp: bytes.fromhex(digest).hex() for stamp, digest in known.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def _save(cache: Path, known: dict[str, str]) -> None:
    """Replace the file in one step; mkstemp makes it readable by its owner only."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(name, cache)
    except BaseException:
        os.unlink(name)
        raise
