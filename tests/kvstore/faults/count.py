"""What came of a campaign."""

from collections import Counter
from dataclasses import dataclass, field

REASONS = 5  # kept


@dataclass
class Count:
    """Of one campaign. Only `outcomes` may be more than zero where the store is as it must be."""

    rounds: int = 0
    wrong: int = 0  # blocks served that were not what was written
    lost: int = 0  # acknowledged blocks that are not there
    stalled: int = 0  # processes that did not end in time
    failed: int = 0  # processes that ended as they may not; audits that were not clean
    most_bytes: int = 0  # resident in one process
    outcomes: Counter = field(default_factory=Counter)
    reasons: list = field(default_factory=list)

    @property
    def is_right(self):
        return not (self.wrong or self.lost or self.stalled or self.failed)

    def fail(self, reason):
        self.failed += 1
        if len(self.reasons) < REASONS:
            self.reasons.append(reason)

    def ended(self, child, *, allowed=(0,)):
        """Note the end of a child; whether it was one of those allowed."""
        self.most_bytes = max(self.most_bytes, child.peak_bytes)
        if child.stalled:
            self.stalled += 1
        elif child.code not in allowed:
            self.fail(f"a child ended with {child.code}, not {allowed}; it said {child.said[-1:]}")
        return child.code in allowed

    def asdict(self):
        return vars(self) | {"is_right": self.is_right}
