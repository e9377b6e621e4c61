"""Where a process kills itself: as it enters or has left a function, the n-th time."""

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
        whole, left = getattr(self.owner, self.name), dice.randint(1, self.most)

        def dying(*args, **kwargs):
            nonlocal left
            left -= self.counts is None or bool(self.counts(*args))
            last = left == 0
            if last and not self.after:
                die()
            result = whole(*args, **kwargs)
            if last:
                die()
            return result

        setattr(self.owner, self.name, dying)
