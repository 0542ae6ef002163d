"""Numbers as text, the same in tables, reports and errors."""

from __future__ import annotations


def amount(cost: str, value: float) -> str:
    """Return a cost with a prefix that leaves three or four digits: "1.25 M", "82.5 kB"; times and energies as "0.58 ms"."""
    for ending, unit in (("_ms", "ms"), ("_mj", "mJ")):
        if cost.endswith(ending):
            return f"{value:.4g} {unit}"
    unit = "B" if cost.endswith("_bytes") else ""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def percent(fraction: float, digits: int = 2) -> str:
    """Return a fraction as percent."""
    return f"{100 * fraction:.{digits}f} %"
