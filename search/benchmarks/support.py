"""`secateur support`: every torchvision classifier is analyzed, sliced, compared and trained one step; see SUPPORT.md.

`secateur support` checks the 63 classifiers with at most 100 M parameters and 4 larger ones, 67 in all;
`secateur support NAME ...` checks only some, replacing just their rows.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from secateur.cost_models.core import InputError
from secateur.envs.model_graph import ModelGraph, analyze
from secateur.envs.pruning.slicing import masked_model, slice_model

PARAMETER_LIMIT = 100_000_000
"""All 63 classifiers with at most this many parameters are checked, ..."""
LARGER = ("vgg16", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf")
"""... and these 4 above the limit."""
PRUNE_RATIO = 0.3
EXACT = 1e-4
"""Largest accepted difference between sliced and masked network, relative to the largest output (float32)."""

_HEADER = """# Supported models

All 63 torchvision classifiers with at most 100 M parameters and 4 larger ones, 67 in all, with random weights, random
batch-norm statistics and at the input size of the published weights. For each: analysis, 30 % of the units of *every* group
removed, the sliced network compared with the full one in which the same entries are zero, its parameter count compared with
the predicted one, and one training step (forward, backward) of the sliced network.

- *MACs*: ours, multiply-accumulates per image; in brackets the published number where it differs by more than 0.5 %.
- *prunable*: share of all output channels of convolution and linear layers that belong to a group.
- *frozen*: why the other channels cannot be pruned, with their number.
- *analysis*: processor seconds of one thread, including tracing and the numerical check.
- *error*: largest difference between sliced and masked network, relative to the largest output.

Written by `secateur support`; naming models on the command line replaces only their rows.

"""
_COLUMNS = ("model", "result", "M params", "GMACs", "groups", "prunable", "frozen", "analysis", "error", "train")


@dataclass(frozen=True)
class SupportRow:
    """What one model's check found; `failure` is None if everything passed."""

    model: str
    failure: str | None
    parameters: int = 0
    macs: float = 0.0
    published_macs: float = 0.0
    groups: int = 0
    prunable: float = 0.0
    frozen: tuple[tuple[str, int], ...] = ()
    seconds: float = 0.0
    error: float = math.nan
    trains: bool = False

    def cells(self) -> list[str]:
        """Return the row of the table."""
        macs = f"{self.macs / 1e9:.3f}"
        # Published numbers are rounded to a thousandth.
        if abs(self.macs - self.published_macs) > max(0.005 * self.published_macs, 0.6e6):
            macs += f" ({self.published_macs / 1e9:.3f})"
        frozen = "; ".join(f"{reason}: {channels}" for reason, channels in self.frozen)
        if self.groups == 0 and self.failure:
            return [self.model, f"FAIL: {self.failure}", *["–"] * (len(_COLUMNS) - 2)]
        return [
            self.model,
            f"FAIL: {self.failure}" if self.failure else "ok",
            f"{self.parameters / 1e6:.2f}",
            macs,
            str(self.groups),
            f"{self.prunable:.0%}",
            frozen,
            f"{self.seconds:.1f} s",
            f"{self.error:.0e}",
            "ok" if self.trains else "–",
        ]


def run_support(names: Sequence[str] | None, output: Path) -> None:
    """Check models (None: all), print their rows, and write them into the table."""
    for row in support_matrix(names, output):
        print(" | ".join(row.cells()), flush=True)


def classifiers() -> list[str]:
    """Return the names of torchvision's classifiers of the support matrix."""
    found = []
    for name in torchvision.models.list_models(module=torchvision.models):
        size = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        if size <= PARAMETER_LIMIT or name in LARGER:
            found.append(name)
    return found


def support_matrix(names: Sequence[str] | None, output: Path) -> Iterator[SupportRow]:
    """Check models and write their rows into the table; yield each row.

    Args:
        names: torchvision's names; None for all.
        output: the Markdown file; rows of other models in it stay.
    Raises:
        InputError: if a name is unknown, or the file cannot be written.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    for name in names or ():
        if name not in known:
            raise InputError(f"torchvision has no classifier {name!r}. See torchvision.models.list_models().")
    check_writable(output)
    for name in names or classifiers():
        row = _in_child(name)
        _write(row, output)
        yield row


def check_writable(output: Path) -> None:
    """Raise InputError if a file cannot be written, before hours of work."""
    existed = output.exists()
    try:
        output.open("a", encoding="utf-8").close()
    except OSError as error:
        failed = f"The table {output} cannot be written: {error.strerror}. Choose another with"
        raise InputError(f"{failed} `output`.", f"{failed} --output.") from None
    if not existed:
        output.unlink()


def check_model(name: str) -> SupportRow:
    """Return one model's row; failures are part of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, size, published = build_classifier(name)
    randomize(model, torch.Generator().manual_seed(0))
    started = time.process_time()  # unlike the wall clock, it does not count what else the machine does
    graph = analyze(model, (torch.zeros(1, 3, size, size),))
    row = _graph_row(name, graph, published, time.process_time() - started)
    kept = _kept(graph, np.random.default_rng(0))
    sliced = slice_model(model, graph, kept)
    error = slicing_error(model, graph, kept, size)
    predicted = _predicted_parameters(graph, [len(units) for units in kept])
    actual = sum(p.numel() for p in sliced.parameters())
    del model
    trains = _trains(sliced, size)
    failures = (
        (not error <= EXACT, f"the sliced network differs by {error:.1e}"),
        (predicted != actual, f"{predicted:.0f} parameters were predicted, but {actual} are there"),
        (not graph.groups, "no group can be pruned"),
        (not trains, "the training step does not give finite gradients"),
    )
    return replace(row, failure=next((text for failed, text in failures if failed), None), error=error, trains=trains)


def _graph_row(name: str, graph: ModelGraph, published_macs: float, seconds: float) -> SupportRow:
    """Return the columns that describe the graph."""
    layers, shapes = graph.geometry.layers, graph.geometry.shapes()
    reasons: Counter[str] = Counter()
    for frozen in graph.frozen:
        reasons[frozen.reason] += frozen.channels
    return SupportRow(
        model=name,
        failure=None,
        parameters=int(_predicted_parameters(graph, graph.geometry.group_units.tolist())),
        macs=float(shapes.weights[0] @ graph.geometry.macs_per_weight) + float(shapes.other_macs[0]),
        published_macs=published_macs,
        groups=len(graph.groups),
        prunable=1 - sum(reasons.values()) / sum(layer.out_channels for layer in layers),
        frozen=tuple(reasons.most_common()),
        seconds=seconds,
    )


def build_classifier(name: str) -> tuple[nn.Module, int, float]:
    """Return (model with random weights, input size, published MACs) of one of torchvision's classifiers."""
    # The auxiliary heads run in training only; the analysis sees eval mode.
    arguments = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    weights = torchvision.models.get_model_weights(name).DEFAULT
    model = torchvision.models.get_model(name, weights=None, **arguments).eval()
    return model, weights.transforms().crop_size[0], weights.meta["_ops"] * 1e9


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Give norms, biases and scales random values: with the zeros and ones of a new network, errors would not show."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")) or "layer_scale" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1 or not tensor.any():
            tensor.normal_(0, 0.1, generator=generator)


@torch.no_grad()
def slicing_error(model: nn.Module, graph: ModelGraph, kept: Sequence[np.ndarray], size: int) -> float:
    """Return the largest difference of the sliced and the masked network, relative to the largest output."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = masked_model(model, graph, kept).eval()(images)
    found = slice_model(model, graph, kept).eval()(images)
    return float((found - expected).abs().max() / expected.abs().max())


def _kept(graph: ModelGraph, rng: np.random.Generator) -> list[np.ndarray]:
    kept = []
    for group in graph.groups:
        count = max(1, round(group.units * (1 - PRUNE_RATIO)))
        kept.append(np.sort(rng.choice(group.units, count, replace=False)))
    return kept


def _predicted_parameters(graph: ModelGraph, widths: Sequence[int]) -> float:
    shapes = graph.geometry.shapes(widths)
    biases = shapes.out_channels[0] @ [layer.has_bias for layer in graph.geometry.layers]
    return round(shapes.weights[0].sum() + biases + shapes.other_parameters[0])


def _trains(model: nn.Module, size: int) -> bool:
    """Return whether one forward and backward pass in training mode gives finite gradients."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    loss = nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1]))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def _in_child(name: str) -> SupportRow:
    """Check a model in a process of its own, which frees its memory when it ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(check_model, name).result()
        except BrokenProcessPool:
            return SupportRow(name, "the process died, probably for lack of memory")
        except Exception as error:  # reported in the row; the other models are still checked
            return SupportRow(name, f"{type(error).__name__}: {error}".splitlines()[0])


def _write(row: SupportRow, output: Path) -> None:
    """Write a row into the table, keeping the rows of other models."""
    lines = {}
    if output.exists():
        for line in output.read_text().splitlines():
            if line.startswith("| ") and not line.startswith(f"| {_COLUMNS[0]} "):
                lines[line.split("|")[1].strip()] = line
    lines[row.model] = "| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |"
    table = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS), *(lines[key] for key in sorted(lines))]
    passed = sum(line.split("|")[2].strip() == "ok" for line in lines.values())
    output.write_text(_HEADER + f"{passed} of {len(lines)} models pass.\n\n" + "\n".join(table) + "\n")
