"""How large a prompt may be: the size at which it almost fills the tokens that it may have."""

from collections.abc import Callable

SLACK = 1 / 400  # of the tokens, that may stay free: not worth another try
GROWTH, STEP = 4, 64  # where prices are not known yet: times what fits, and so much more


class DoesNotFit(Exception):
    """Not even the least size fits.

    Args:
        tokens: that the least size takes.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__(f"{tokens} tokens at the least")
        self.tokens = tokens


def fit(
    cost: Callable[[int], int],
    room: int,
    least: int,
    most: int | None = None,
    guess: int | None = None,
) -> int:
    """A size that costs at most `room` tokens, and one more would not, or all but `SLACK` is used.

    Sizes are guessed along the line from the least size through the last one tried, which takes
    three or four tries where the cost is nearly linear; halving takes over where it is not. A
    price below a token is that of sizes at which nothing came in yet, as no document fits them:
    then the next size is bounded by the last, as it may be the length of a text.

    Args:
        cost: tokens of a prompt of that size, roughly growing with it.
        most: the largest size there is.
        guess: what fits a prompt of the same kind.
    Raises:
        DoesNotFit: the least size costs more.
    """
    base = spent = cost(least)
    if base > room:
        raise DoesNotFit(base)
    fits, over = least, None if most is None else most + 1
    tried = max(least + 1, guess or 2 * least + 8)
    while (over is None or over - fits > 1) and room - spent > SLACK * room:
        if over is not None and tried >= over:
            tried = (fits + over) // 2
        found = cost(tried)
        price = max((found - base) / (tried - least), 1e-3)
        if found <= room:
            fits, spent = tried, found
        else:
            over = tried
        further = int((room - spent) / price)
        if price < 1:
            further = min(further, (GROWTH - 1) * fits + STEP)
        tried = fits + max(1, further)
    return fits
