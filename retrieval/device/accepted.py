"""What a slot of codes asks of the index of one request before it takes its state."""

from retrieval.index import KeySpace, KVIndex, State


def accepted(index: KVIndex, kind: type, key_space: KeySpace, capacity: int) -> State:
    """The state of an index that has taken all of its keys.

    Raises:
        ValueError: if it is not of this kind, not final, of other keys, or too long.
    """
    if not isinstance(index, kind):
        raise ValueError(f"need {kind.__name__}, got {type(index).__name__}")
    state = index.state()
    if "keys" in state:
        raise ValueError("the index still holds its keys: finalize it first")
    if index.spec.key_space != key_space:
        raise ValueError(f"need an index of {key_space} keys, got {index.spec.key_space} ones")
    if index.length > capacity:
        raise ValueError(
            f"{index.length} tokens do not fit slots of {capacity} tokens: raise capacity"
        )
    return state
