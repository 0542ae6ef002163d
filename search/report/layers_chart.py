"""The plot of one policy: bars per layer, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.cost_models.core import FLOAT_BITS
from secateur.search.report.chart import Row, Spec, axis, number, text, words
from secateur.search.report.layers import LayerRow, LayerView

ROW = 17
"""Height of a layer's row in pixels."""
BITS: Mapping[str, Any] = {"width": 62, "values": [0, 8, 32], "domain": [0, FLOAT_BITS]}


def layer_rows(rows: Sequence[LayerRow]) -> list[Row]:
    """Return the rows of the dataset `layers`."""
    return [
        {
            "layer": row.layer,
            "channels": row.channels,
            "dense_channels": row.dense_channels,
            "kept": row.channels / row.dense_channels,
            "weight_bits": row.weight_bits,
            "activation_bits": row.activation_bits,
            "sensitivity": row.sensitivity,
            **{f"c{i}": share for i, share in enumerate(row.shares.values())},
        }
        for row in rows
    ]


def layers_spec(view: LayerView, costs: Sequence[str]) -> Spec:
    """Return the plot; its dataset is `layers`, and `costs` are those whose shares it has."""
    config, measured = view.space.config, view.curves is not None
    quantized = [name for name in ("weight_bits", "activation_bits") if min(getattr(config, name) or (FLOAT_BITS,)) < FLOAT_BITS]
    tooltip = [
        text("layer"),
        number("channels", title="channels kept"),
        number("dense_channels", title="channels of the dense model"),
        *(number(name) for name in quantized),
        *([number("sensitivity", ".3~g", "sensitivity (nats)")] if measured else []),
        *(number(f"c{i}", ".1%", f"share of {words(cost)}") for i, cost in enumerate(costs)),
    ]
    parts = [_kept_panel(tooltip)]
    parts += [_panel(name, words(name), "#E69F00", tooltip, "d", **BITS) for name in quantized]
    parts += [_panel("sensitivity", "sensitivity (nats)", "#CC79A7", tooltip, ".2~g", width=100)] if measured else []
    parts += [_panel(f"c{i}", ["share of", words(cost)], "#009E73", tooltip, "%", width=86) for i, cost in enumerate(costs)]
    height = ROW * len(view.graph.geometry.layers)
    return {"data": {"name": "layers"}, "hconcat": [{**part, "height": height} for part in parts], "spacing": 16}


def _layer_axis(labels: bool) -> Spec:
    return {"field": "layer", "type": "nominal", "sort": None, "axis": {"labelLimit": 150, "title": None} if labels else None}


def _kept_panel(tooltip: list[Spec]) -> Spec:
    x, y = axis("channels kept", "%", domain=[0, 1.35]), _layer_axis(labels=True)
    x["axis"]["values"] = [0, 0.5, 1]
    whole = {"mark": {"type": "bar", "color": "#8a8a8a", "opacity": 0.25}, "encoding": {"x": {"datum": 1, **x}, "y": y}}
    bar = {"mark": {"type": "bar", "color": "#0072B2"}, "encoding": {"x": {"field": "kept", **x}, "y": y, "tooltip": tooltip}}
    label = {
        "transform": [{"calculate": "datum.channels + ' / ' + datum.dense_channels", "as": "of"}],
        "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10},
        "encoding": {"x": {"datum": 1, **x}, "y": y, "text": text("of")},
    }
    return {"layer": [whole, bar, label], "width": 190}


def _panel(
    field: str,
    title: str | list[str],
    color: str,
    tooltip: list[Spec],
    number_format: str,
    width: int,
    values: Sequence[float] | None = None,
    domain: Sequence[float] | None = None,
) -> Spec:
    x = {"field": field, **axis(title, number_format, ticks=2, **({} if domain is None else {"domain": domain}))}
    x["axis"] |= {} if values is None else {"values": values}
    encoding = {"x": x, "y": _layer_axis(labels=False), "tooltip": tooltip}
    return {"mark": {"type": "bar", "color": color}, "encoding": encoding, "width": width}
