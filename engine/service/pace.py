"""How much of a step goes to prompts while others are answered."""

from math import inf

LEAST = 16  # tokens, so that prompts always come on
STALE = 32  # steps with prompts, after which one without them shows again what that takes
WEIGHT = 0.2  # of the newest step in what is known


class Pace:
    """Learns what steps take, and says how many prompt tokens the next one may have.

    A step with prompts should take at most `slowdown` times one that only decodes: Sarathi-Serve
    (Agrawal et al. 2024) measures the largest step that meets a bound on the time between tokens;
    this measures it while it serves, as it depends on lengths and on how many are answered.

    Args:
        slowdown: more than 1; infinity lets prompts fill every step.
    """

    def __init__(self, slowdown: float) -> None:
        self._slowdown = slowdown
        self._alone_s: float | None = None  # a step that only decodes
        self._token_s: float | None = None  # each prompt token more
        self._since = 0  # steps with prompts since one without
        self._owed_s = 0.0  # of steps that decode, before they may pause again

    def allows(self) -> int | None:
        """Prompt tokens beside decodes; None if there is no bound."""
        if self._slowdown == inf:
            return None
        if self._alone_s is None or self._since >= STALE:
            return 0
        if self._token_s is None:
            return LEAST
        return max(LEAST, int((self._slowdown - 1) * self._alone_s / self._token_s))

    def may_pause(self) -> bool:
        """Whether something else may come between two steps."""
        return not self._owed_s

    def paused(self, seconds: float) -> None:
        """Something else came between two steps, for so long."""
        self._owed_s = seconds / (self._slowdown - 1)

    def learn(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        self._owed_s = max(0.0, self._owed_s - seconds) if decodes else 0.0
        if not decodes:
            return
        if not prompt_tokens:
            self._alone_s, self._since = _mixed(self._alone_s, seconds), 0
            return
        self._since += 1
        if self._alone_s is not None:
            more = max(seconds - self._alone_s, 0.05 * seconds) / prompt_tokens
            self._token_s = _mixed(self._token_s, more)


def _mixed(known: float | None, new: float) -> float:
    """What is known, and a little of what is new; one long pause changes it by little."""
    if known is None:
        return new
    return known + WEIGHT * (min(new, 4 * known) - known)
