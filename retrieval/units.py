"""Runs of keys that share one summary: kept as keys until `finalize`, as summaries after it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retrieval.index import State
from retrieval.pending import Rows, products, unit_max

Summarise = Callable[[Float[Tensor, "Hk U N D"]], Float[Tensor, "Hk U E"]]

RUN_UNITS = 512  # summarised at once: in fp32, all of them would be twice the keys


class Units:
    """What an index of chunks or pages holds of its keys.

    Until `finalize` all keys, after it a summary per unit. The last unit counts with the keys it
    has so far, which are kept until it is full; so how keys were cut into appends leaves no trace.

        summaries [Hk, full | open, E]    open [Hk, < unit, D]: the keys of the unit being filled

    Args:
        unit: keys that share a summary.
        summarise: from the keys of some units, all with equally many, to a row for each.
        keys: those that wait for `finalize`.
    """

    def __init__(self, unit: int, summarise: Summarise, keys: Rows) -> None:
        self._unit, self._summarise = unit, summarise
        self._keys: Rows | None = keys
        self._open = keys.view[:, :0]
        self._full = 0
        self._summaries = Rows.of(summarise(self._open.unflatten(1, (0, 1))))

    @classmethod
    def of(cls, unit: int, summarise: Summarise, state: State) -> "Units":
        """The units whose `state` this is; shares its tensors."""
        if "keys" in state:
            return cls(unit, summarise, Rows.of(state["keys"]))
        made = cls(unit, summarise, Rows.of(state["open"][:, :0]))
        made._keys, made._summaries = None, Rows.of(state["summaries"])
        made._full = made._summaries.length
        made._summarised(state["open"])
        return made

    @property
    def length(self) -> int:
        """Tokens there are."""
        if self._keys is not None:
            return self._keys.length
        return self._full * self._unit + self._open.shape[1]

    @property
    def nbytes(self) -> int:
        """Of keys that wait, summaries and open keys, room to grow included."""
        waiting = 0 if self._keys is None else self._keys.nbytes
        return waiting + self._summaries.nbytes + self._open.nbytes

    @property
    def waiting(self) -> Float[Tensor, "Hk N D"] | None:
        """All keys, before `finalize`; None after it."""
        return None if self._keys is None else self._keys.view

    @property
    def summaries(self) -> Float[Tensor, "Hk U E"]:
        """One row per unit, the last of them of a unit that is perhaps not full."""
        return self._summaries.view

    def append(self, keys: Float[Tensor, "Hk N D"]) -> None:
        """The next N keys."""
        if self._keys is not None:
            self._keys.append(keys)
        else:
            self._summarised(keys)

    def finalize(self) -> None:
        """Summarise all keys that waited, and forget them.

        Raises:
            RuntimeError: at the second call.
        """
        if self._keys is None:
            raise RuntimeError("the index is finalized: what it chose stays, append further keys")
        keys, self._keys = self._keys.view, None
        self._summaries.reserve(-(-keys.shape[1] // self._unit))
        self._summarised(keys)

    def exact(self, query: Float[Tensor, "Hq D"]) -> Float[Tensor, "Hq U"]:
        """The largest q · k of every unit, while the keys are there."""
        assert self._keys is not None
        return unit_max(products(query, self._keys.view), self._unit)

    def state(self) -> State:
        """Keys, or summaries of full units and open keys; views, which no append changes."""
        if self._keys is not None:
            return {"keys": self._keys.view}
        return {"summaries": self._summaries.view[:, : self._full], "open": self._open}

    def _summarised(self, keys: Float[Tensor, "Hk N D"]) -> None:
        if self._open.shape[1]:
            keys = torch.cat([self._open, keys], 1)
        units = keys.shape[1] // self._unit
        full, rest = keys[:, : units * self._unit], keys[:, units * self._unit :]
        self._summaries.rewind(self._full)
        for run in full.unflatten(1, (units, self._unit)).split(RUN_UNITS, 1):
            self._summaries.append(self._summarise(run))
        self._full += units
        self._open = rest.clone()  # not a view, which would keep all keys
        if rest.shape[1]:
            self._summaries.append(self._summarise(rest[:, None]))
