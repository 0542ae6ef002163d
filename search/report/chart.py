"""A plot as a Vega-Lite specification with its rows, and the parts of specifications that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]
Spec: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        name: of its files.
        spec: Vega-Lite, without data.
        rows: {name of a dataset: rows}.
        readable: rows of the CSV file; None: those of the first dataset.
    """

    name: str
    spec: Spec
    rows: dict[str, list[Row]]
    readable: list[Row] | None = None

    @property
    def full(self) -> Spec:
        """The specification with its data."""
        return {**self.spec, "datasets": self.rows}

    @property
    def table(self) -> list[Row]:
        """The rows of the CSV file."""
        return next(iter(self.rows.values())) if self.readable is None else self.readable


def text(field: str, title: str | None = None) -> Spec:
    """Return a field of texts, for a tooltip or a label."""
    return {"field": field, "type": "nominal", "title": title or words(field)}


def number(field: str, number_format: str = "", title: str | None = None) -> Spec:
    """Return a field of numbers, for a tooltip."""
    return {"field": field, "type": "quantitative", "format": number_format, "title": title or words(field)}


def axis(title: str | list[str], number_format: str, ticks: int = 8, **scale: Any) -> Spec:
    """Return a quantitative channel without its field; `scale` are options of its scale."""
    drawn = {"format": number_format, "title": title, "tickCount": ticks}
    return {"type": "quantitative", "axis": drawn, "scale": scale}


def facet_by(field: str, order: Sequence[str] | None = None) -> Spec:
    """Return a facet with one plot per value, and the value above it."""
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "header": {"labelFontWeight": "bold"},
        "sort": order and list(order),
    }


def words(name: str) -> str:
    """Return a field's name as words."""
    return name.replace("_", " ")
