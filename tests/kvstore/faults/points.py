"""Where a process kills itself: as it enters or has left a function, the n-th time."""

from itertools import count
from typing import NamedTuple

from tests.kvstore.faults.children import die


class Point(NamedTuple):
    """A function of the store, by where it is looked up."""

    owner: object
    name: str
    after: bool = False
    most: int = 1  # calls: the one that kills is one of these
    counts: object = None  # which calls do, by their arguments; None for all

    def arm(self, dice):
        """Make a call of it the process's last."""
        whole, fatal = getattr(self.owner, self.name), dice.randint(1, self.most)
        calls = count(1)  # of several threads, each of which gets a number of its own

        def dying(*args, **kwargs):
            last = (self.counts is None or self.counts(*args)) and next(calls) == fatal
            if last and not self.after:
                die()
            result = whole(*args, **kwargs)
            if last:
                die()
            return result

        setattr(self.owner, self.name, dying)
