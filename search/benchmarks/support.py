"""`secateur support`: models are analyzed, sliced, compared and trained one step; see SUPPORT.md.

`secateur support` checks 67 torchvision classifiers, and 56 models of the second table: of timm, if it is installed, and for
segmentation, detection, video and optical flow. `secateur support NAME ...` checks only some, replacing just their rows.
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
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from secateur.cost_models.core import InputError
from secateur.cost_models.macs import Macs
from secateur.envs.model_graph import ModelGraph, analyze
from secateur.envs.model_graph.trace import root_cause
from secateur.envs.pruning.slicing import masked_model, slice_model
from secateur.envs.tasks.core import tensors_of
from secateur.search.benchmarks.support_models import build_checked, check_name, classifiers, others
from secateur.search.export.image_size import free_batch
from secateur.search.export.onnx_export import quiet

PRUNE_RATIO = 0.3
EXACT = 1e-4
"""Largest accepted difference between sliced and masked network, relative to the largest output (float32)."""

_HEADER = """# Supported models

## torchvision's classifiers

All 63 torchvision classifiers with at most 100 M parameters and 4 larger ones, 67 in all, with random weights, random
batch-norm statistics and at the input size of the published weights. For each: analysis, 30 % of the units of *every* group
removed, the sliced network compared with the full one in which the same entries are zero, its parameter count compared with
the predicted one, and one training step (forward, backward) of the sliced network.

- *MACs*: ours, multiply-accumulates per image; in brackets the published number where it differs by more than 0.5 %.
- *prunable*: share of all output channels of convolution and linear layers that belong to a group.
- *frozen*: why the other channels cannot be pruned, with their number.
- *analysis*: processor seconds of one thread, including tracing and the numerical check.
- *error*: largest difference between sliced and masked network, relative to the largest output.
- *train*: whether one step of training gives finite gradients.

Written by `secateur support`; naming models on the command line replaces only their rows.

"""
_COLUMNS = ("model", "result", "M params", "GMACs", "groups", "prunable", "frozen", "analysis", "error", "train")

_OTHERS = """## timm, segmentation, detection, video, flow

40 models of timm at their input size, and 16 of torchvision: segmentation and the backbones of detectors at 128 x 128 pixels,
(`ssd300_vgg16` at 300), video at 16 frames of 64 x 64 (`s3d` at 224), optical flow of two images of 128 x 128. In addition:

- *MACs pruned*: share of all multiply-accumulates that is removed with 30 % of the units of every group.
- *quantizable*: convolution and linear layers whose bits can be chosen, of all.
- *ONNX*: largest difference between the sliced network in PyTorch and its export in ONNX Runtime, relative to the largest output.

"""
_OTHER_COLUMNS = (
    *("model", "result", "M params", "GMACs", "groups", "prunable", "MACs pruned", "quantizable", "frozen", "analysis"),
    *("error", "train", "ONNX"),
)


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
    pruned_macs: float = 0.0
    layers: tuple[int, int] = (0, 0)
    onnx: str = "–"

    @property
    def columns(self) -> tuple[str, ...]:
        """The header of the table with this row."""
        return _OTHER_COLUMNS if "/" in self.model else _COLUMNS

    def cells(self) -> list[str]:
        """Return the row of the table."""
        macs = f"{self.macs / 1e9:.3f}"
        # Published numbers are rounded to a thousandth.
        if abs(self.macs - self.published_macs) > max(0.005 * self.published_macs, 0.6e6):
            macs += f" ({self.published_macs / 1e9:.3f})"
        frozen = "; ".join(f"{reason}: {channels}" for reason, channels in self.frozen)
        if self.groups == 0 and self.failure:
            return [self.model, f"FAIL: {self.failure}", *["–"] * (len(self.columns) - 2)]
        cells = {
            "model": self.model,
            "result": f"FAIL: {self.failure}" if self.failure else "ok",
            "M params": f"{self.parameters / 1e6:.2f}",
            "GMACs": macs,
            "groups": str(self.groups),
            "prunable": f"{self.prunable:.0%}",
            "MACs pruned": f"{self.pruned_macs:.0%}",
            "quantizable": f"{self.layers[0]} of {self.layers[1]}",
            "frozen": frozen,
            "analysis": f"{self.seconds:.1f} s",
            "error": f"{self.error:.0e}",
            "train": "ok" if self.trains else "–",
            "ONNX": self.onnx,
        }
        return [cells[column] for column in self.columns]


def run_support(names: Sequence[str] | None, output: Path) -> None:
    """Check models (None: all), print their rows, and write them into the table."""
    for row in support_matrix(names, output):
        print(" | ".join(row.cells()), flush=True)


def support_matrix(names: Sequence[str] | None, output: Path) -> Iterator[SupportRow]:
    """Check models and write their rows into the table; yield each row.

    Args:
        names: torchvision's classifiers, or names with a kind, e.g. "timm/vit_tiny_patch16_224"; None for all.
        output: the Markdown file; rows of other models in it stay.
    Raises:
        InputError: if a name is unknown, or the file cannot be written.
    """
    for name in names or ():
        check_name(name)
    check_writable(output)
    for name in names or (*classifiers(), *others()):
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
    checked = build_checked(name)
    model, inputs = checked.model, checked.inputs
    randomize(model, torch.Generator().manual_seed(0))
    started = time.process_time()  # unlike the wall clock, it does not count what else the machine does
    graph = analyze(model, inputs)
    row = _graph_row(name, graph, checked.published_macs, time.process_time() - started)
    kept = _kept(graph, np.random.default_rng(0))
    sliced = slice_model(model, graph, kept)
    inputs = random_inputs(inputs)
    error = slicing_error(model, graph, kept, inputs)
    widths = [len(units) for units in kept]
    predicted = _predicted_parameters(graph, widths)
    actual = sum(p.numel() for p in sliced.parameters())
    pruned_macs = 1 - _macs(graph, widths) / _macs(graph, graph.geometry.group_units.tolist())
    exported = onnx_error(sliced, inputs) if "/" in name else "–"
    del model
    trains = _trains(sliced, inputs)
    failures = (
        (not error <= EXACT, f"the sliced network differs by {error:.1e}"),
        (predicted != actual, f"{predicted:.0f} parameters were predicted, but {actual} are there"),
        (not graph.groups, "no group can be pruned"),
        (not trains, "the training step does not give finite gradients"),
    )
    failure = next((text for failed, text in failures if failed), None)
    return replace(row, failure=failure, error=error, trains=trains, pruned_macs=pruned_macs, onnx=exported)


def _graph_row(name: str, graph: ModelGraph, published_macs: float, seconds: float) -> SupportRow:
    """Return the columns that describe the graph."""
    layers, units = graph.geometry.layers, graph.geometry.group_units.tolist()
    reasons: Counter[str] = Counter()
    for frozen in graph.frozen:
        reasons[frozen.reason] += frozen.channels
    return SupportRow(
        model=name,
        failure=None,
        parameters=int(_predicted_parameters(graph, units)),
        macs=_macs(graph, units),
        published_macs=published_macs,
        groups=len(graph.groups),
        prunable=1 - sum(reasons.values()) / sum(layer.out_channels for layer in layers),
        frozen=tuple(reasons.most_common()),
        seconds=seconds,
        layers=(sum(layer.quantizable for layer in layers), len(layers)),
    )


def _macs(graph: ModelGraph, widths: Sequence[int]) -> float:
    return float(Macs().total(graph.geometry.shapes(widths))[0])


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


def random_inputs(examples: Sequence[Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """Return a random batch of two for each example input."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *x.shape[1:], generator=generator) for x in examples)


@torch.no_grad()
def slicing_error(model: nn.Module, graph: ModelGraph, kept: Sequence[np.ndarray], inputs: Sequence[Tensor]) -> float:
    """Return the largest difference of the sliced and the masked network, relative to the largest output."""
    expected = tensors_of(masked_model(model, graph, kept).eval()(*inputs))
    found = tensors_of(slice_model(model, graph, kept).eval()(*inputs))
    return _difference(found, expected)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def onnx_error(model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Return the difference of a network and its ONNX export in ONNX Runtime, or the reason why there is none."""
    expected = tensors_of(model(*inputs))
    try:
        with quiet():
            shapes = free_batch(model, inputs)
            program: Any = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        feeds = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
        return f"{_difference([torch.from_numpy(x) for x in session.run(None, feeds)], expected):.0e}"
    except Exception as error:  # the exporter runs the model's forward and many passes of its own
        return f"no: {root_cause(error)[:100]}"


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


def _trains(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return whether one forward and backward pass in training mode gives finite gradients."""
    outputs = tensors_of(model.train()(*random_inputs(inputs, seed=1)))
    torch.stack([x.square().mean() for x in outputs]).sum().backward()
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
    """Write a row into its table, keeping the rows of other models."""
    lines = {}
    if output.exists():
        for line in output.read_text().splitlines():
            if line.startswith("| ") and not line.startswith(f"| {_COLUMNS[0]} "):
                lines[line.split("|")[1].strip()] = line
    lines[row.model] = "| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |"
    of_others = {name: line for name, line in lines.items() if "/" in name}
    of_classifiers = {name: line for name, line in lines.items() if name not in of_others}
    text = _HEADER + _table(of_classifiers, _COLUMNS)
    output.write_text(text + (f"\n{_OTHERS}{_table(of_others, _OTHER_COLUMNS)}" if of_others else ""))


def _table(lines: dict[str, str], columns: Sequence[str]) -> str:
    passed = sum(line.split("|")[2].strip() == "ok" for line in lines.values())
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *(lines[key] for key in sorted(lines))]
    return f"{passed} of {len(lines)} models pass.\n\n" + "\n".join(table) + "\n"
