"""Numbers as a reader wants them: aligned, signed, with their unit, and a dash for none."""

NONE = "–"
MINUS = "−"


def points(value: float | None) -> str:
    """A score, 0..100."""
    return NONE if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A difference in points: `+0.4`, `−1.2`, `0.0`."""
    if value is None:
        return NONE
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def span(low: float | None, high: float | None) -> str:
    """The ends of an interval of differences."""
    return NONE if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def budget(value: float | None) -> str:
    """`1.6 %` of the prompt's tokens, or `2,048` tokens."""
    if value is None:
        return "all"
    return f"{100 * value:.3g} %" if value < 1 else f"{value:,.0f}"


def length(tokens: int | None) -> str:
    """`4k` for 4,096, `1,000` for 1,000."""
    if tokens is None:
        return NONE
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def count(value: float | None) -> str:
    """Tokens or bytes: whole above 100, with a digit more below."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def errors(found: int) -> str:
    return f"{found:,} error" + "s" * (found != 1)


def number(value: float | None) -> str:
    """Any measure, to three digits."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    text = f"{value:#.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
    return text.rstrip(".").replace("-", MINUS)


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def size(nbytes: int | float | None) -> str:
    """Bytes with a binary unit."""
    if nbytes is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
