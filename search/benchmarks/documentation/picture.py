"""The picture in README: top-1 of every agent's winners over the budgets' multiply-accumulates, as SVG.

Two files, because pages come in a light and a dark theme. Each holds its numbers as JSON in its metadata, so that a check needs
neither matplotlib nor the same fonts.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.documentation.tables import by_agent, is_short, read_records, tops

RESULTS = "results/budgets"
FILES = {"docs/top1_over_macs.svg": False, "docs/top1_over_macs_dark.svg": True}
"""{file: whether its page is dark}."""
PANELS = {"plain_test_score": "with the quick repair of the search", "test_score": "after the finalists' repair"}
"""{which test top-1 of a winner: heading}."""
COLORS = ("#e8590c", "#1c7ed6", "#2f9e44", "#ae3ec9", "#f59f00", "#868e96", "#0ca678", "#e64980")
"""Medium tones: legible on white and on black."""
NUMBERS = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)


def numbers(root: Path) -> dict[str, Any]:
    """Return what is drawn: {"budgets": percent of the dense MACs, "dense": top-1 in percent, "agents": {label: {kind: [mean,
    standard deviation] per budget}}}, best mean repaired top-1 first."""
    folder = root / RESULTS
    header, rows = read_records(folder)
    budgets = header["config"]["budgets"]
    agents = {
        label: {kind: [mean_and_spread(tops(group, budget, kind)) for budget in budgets] for kind in PANELS}
        for label, group in by_agent(rows).items()
        if is_short(label)
    }
    order = sorted(agents, key=lambda label: -sum(mean for mean, _ in agents[label]["test_score"]))
    return {
        "budgets": [float(limits["macs"].strip("<=% ")) for limits in budgets.values()],
        "dense": dense_top1(folder),
        "agents": {label: agents[label] for label in order},
    }


def mean_and_spread(values: Sequence[float]) -> list[float]:
    """Return [mean, standard deviation] with the digits that a picture can show."""
    return [round(float(np.mean(values)), 2), round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else 0.0]


def dense_top1(folder: Path) -> float:
    """Return the dense network's test top-1 in percent, from results.md: the rows do not hold it."""
    found = re.search(r"([\d.]+) % on \d+ test images", (folder / "results.md").read_text(encoding="utf-8"))
    if found is None:
        raise InputError(f"{folder / 'results.md'} does not say the dense network's test top-1. Run the benchmark once more.")
    return float(found[1])


def outdated(root: Path) -> list[Path]:
    """Return the pictures that are missing or hold other numbers."""
    wanted = json.dumps(numbers(root))
    return [root / file for file in FILES if drawn_numbers(root / file) != wanted]


def drawn_numbers(file: Path) -> str | None:
    """Return the JSON in a picture's metadata; None if there is no such picture."""
    found = NUMBERS.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return html.unescape(found[1]) if found else None


def draw_files(root: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Return {file: SVG} of these pictures.

    Raises:
        InputError: if matplotlib is missing.
    """
    return {file: draw(numbers(root), FILES[file.relative_to(root).as_posix()]) for file in files}


def draw(shown: dict[str, Any], dark: bool) -> str:
    """Return the picture as SVG with a transparent background; see `numbers` for what is shown."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("Pictures are drawn with matplotlib, which is missing. Install it: pip install '.[docs]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    ink = "#e6edf3" if dark else "#1f2328"
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "secateur", "font.family": "sans-serif", "font.size": 10,
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, len(PANELS), figsize=(9.5, 4.2))
        for panel, (kind, heading) in zip(panels, PANELS.items(), strict=True):
            draw_panel(panel, shown, kind, ink)
            panel.set_title(heading, fontsize=10)
        panels[0].set_ylabel("test top-1 in %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.14, 1, 1))
        file = io.StringIO()
        metadata = {"Date": None, "Title": "Test top-1 over multiply-accumulates", "Description": json.dumps(shown)}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw_panel(panel: Any, shown: dict[str, Any], kind: str, ink: str) -> None:
    """Draw one line per agent, with standard deviations over seeds, and the dense network."""
    for (label, agent), color in zip(shown["agents"].items(), COLORS, strict=False):
        means, spreads = zip(*agent[kind], strict=True)
        panel.errorbar(shown["budgets"], means, yerr=spreads, label=label, color=color, marker="o", markersize=4, capsize=2)
    panel.axhline(shown["dense"], color=ink, linestyle=":", label="dense network")
    panel.set_xlabel("budget: MACs in % of the dense network")
    panel.set_xticks(shown["budgets"])
    panel.grid(color=ink, alpha=0.15)
