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
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def parameters(count: float) -> str:
    """Write a parameter count in millions or billions (10^6, 10^9)."""
    return (
        f"{count / 1e9:.2f} B"
        if count >= 1e9
        else f"{count / 1e6:.1f} M"
        if count >= 1e6
        else f"{count:,}"
    )


def size(count: float) -> str:
    """Write bytes in binary units."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return (
        f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "B" else f"{value:.2f} {units[0]}"
    )


def listed(names: Sequence[str]) -> str:
    return (
        names[0]
        if len(names) == 1
        else f"{', '.join(names[:-1])} and {names[-1]}"
        if names
        else "none"
    )


def printable(text: str) -> str:
    """A text whose control characters, which would be orders to a terminal, are replaced; lines and
    tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
