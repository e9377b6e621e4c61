"""An index's state as bytes and back, so that a store can keep it with the KV it stands for."""

from safetensors import SafetensorError
from safetensors.torch import load, save

from retrieval.index import State

FORMAT = "headrace-index-1"


def to_bytes(state: State, kind: str) -> bytes:
    """The record of an index's state: plain tensors behind a header, nothing that can execute.

    Args:
        kind: the name of the index; `from_bytes` gives the state to nobody else.
    """
    # clones: views may share memory, which safetensors refuses
    return save({f"{FORMAT}/{kind}/{name}": x.contiguous().clone() for name, x in state.items()})


def from_bytes(record: bytes, kind: str) -> State:
    """The state that `to_bytes` wrote.

    Raises:
        ValueError: if this is no record, or one of another format or index.
    """
    try:
        named = load(record)
    except SafetensorError as error:
        raise ValueError(f"not a record of an index: {error}") from error
    wanted = f"{FORMAT}/{kind}/"
    if not named or not all(name.startswith(wanted) for name in named):
        found = sorted({name.rpartition("/")[0] for name in named}) or ["nothing"]
        raise ValueError(f"need a record of {wanted[:-1]}, got {', '.join(found)}: build it anew")
    return {name.removeprefix(wanted): tensor for name, tensor in named.items()}
