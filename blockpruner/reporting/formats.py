"""How numbers are written for people, the same in every table, sentence and plot."""

import re
from collections.abc import Sequence


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def times(factor: float) -> str:
    return f"{number(factor)}×"


def number(value: float) -> str:
    """Write three to four significant digits with a thousands separator, for rates and
    perplexities."""
    if value >= 1e6:
        return f"{value:.3g}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def parameters(count: float) -> str:
    """Write a parameter count in millions or billions (10^6, 10^9)."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def size(count: float) -> str:
    """Write bytes in binary units."""
    if count < 1024:
        return f"{count:.0f} B"
    value, unit = count / 1024, "KiB"
    for larger_unit in ("MiB", "GiB"):
        if value >= 1024:
            value, unit = value / 1024, larger_unit
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"


def listed(names: Sequence[str]) -> str:
    """Write names with commas and "and"."""
    *front, end = names or ["none"]
    return f"{', '.join(front)} and {end}" if front else end


def printable(text: str) -> str:
    """A text whose control characters, which would be orders to a terminal, are replaced; lines and
    tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
