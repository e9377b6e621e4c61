"""A union of time intervals, in bounded memory."""

from bisect import bisect_left, bisect_right


class Intervals:
    """How much time at least one of many intervals covers; overlaps count once.

    Disjoint intervals are kept in order. When there are more than `limit`, the older half is
    settled: only its sum is kept, and what is added later counts from there on. So the union is
    exact while no interval begins before the last `limit / 2` gaps, and never too large.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._settled = 0  # time covered before the horizon
        self._horizon: int | None = None

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def full(self) -> bool:
        """Whether the next gap makes it settle."""
        return len(self._starts) >= self._limit

    def add(self, start: int, end: int) -> None:
        """Cover [start, end); an empty one covers nothing."""
        if self._horizon is not None:
            start = max(start, self._horizon)
        if end <= start:
            return
        if not self._ends or start > self._ends[-1]:  # the usual case: time goes on
            self._starts.append(start)
            self._ends.append(end)
            self._bound()
            return
        first = bisect_left(self._ends, start)  # those it touches become one with it
        last = bisect_right(self._starts, end)
        touched = slice(first, last)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[touched] = [start]
        self._ends[touched] = [end]
        self._bound()

    def covered(self) -> int:
        """The length of the union."""
        return self._settled + sum(self._ends) - sum(self._starts)

    def _bound(self) -> None:
        if len(self._starts) <= self._limit:
            return
        old = len(self._starts) - self._limit // 2
        self._settled += sum(self._ends[:old]) - sum(self._starts[:old])
        self._horizon = self._ends[old - 1]
        del self._starts[:old], self._ends[:old]
