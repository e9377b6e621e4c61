"""What the indexes of a batch have alike in which every token has a code of its own."""

from typing import ClassVar

from retrieval.index import KeySpace, KVIndex, State


class Coded:
    """Slots of codes; codes behind a length are not read.

    Args:
        key_space: of the keys that are coded.
        capacity: of a slot, in tokens.
    """

    unit_tokens = 1
    kind: ClassVar[type]  # of a request's index

    def __init__(self, key_space: KeySpace, capacity: int) -> None:
        self.key_space: KeySpace = key_space
        self.capacity = capacity

    @property
    def outliers(self) -> None:
        """None: there is no token without a code, and none that must be taken."""
        return

    def clear(self, slot: int) -> None:
        """Nothing: what the slot held stays, unread, until `adopt` replaces it."""

    def _accepted(self, index: KVIndex) -> State:
        """The state of a request's index that has taken all of its keys.

        Raises:
            ValueError: if it is of another kind, not final, of other keys, or too long.
        """
        if not isinstance(index, self.kind):
            raise ValueError(f"need {self.kind.__name__}, got {type(index).__name__}")
        state = index.state()
        if "keys" in state:
            raise ValueError("the index still holds its keys: finalize it first")
        if index.spec.key_space != self.key_space:
            raise ValueError(
                f"need an index of {self.key_space} keys, got {index.spec.key_space} ones"
            )
        if index.length > self.capacity:
            raise ValueError(
                f"{index.length} tokens do not fit slots of {self.capacity} tokens: raise capacity"
            )
        return state
