"""Checks what an export promises, from its files alone: outputs, scores, costs, and the latency that is measured now.

Tolerances of the ONNX file against the network in PyTorch:
- All layers in float32, and no input with bits: the two differ by the order of sums. No logit may differ by more than 0.1 % of
  the logits' standard deviation (measured: below 0.001 %).
- Otherwise the arithmetic differs on purpose (see onnx_export.py), and the answers count: at least 80 % of them must be the
  same, and top-1 must not be lower by more than 1 point and twice the standard error of that difference. Measured on
  ResNet-56, 2,000 images: 99.3 % and 0.1 points at 8 bits, 95.5 % and no loss at 4; MobileNetV2 and SqueezeNet with their
  1,000 classes at 8 bits: 93 and 94 %, where the simulation itself gives 95 and 94 % of the dense network's answers. A wrong
  grid or code costs tens of points.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from torch import Tensor, nn

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import FLOAT_BITS, CostModel, LayerShapes
from secateur.cost_models.device import Device, parse_device
from secateur.envs.core import InputError
from secateur.envs.evaluator import batches
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.fake_quantize import ActivationQuantizer, activation_grid, quantized_weight
from secateur.envs.tasks.data import TaskData, load_data
from secateur.search.config import DataSection
from secateur.search.export.folder import ONNX, POLICY, build_dense, check_files, load_compressed, read_export
from secateur.search.export.onnx_export import export_onnx
from secateur.search.profiling.profiler import describe_machine
from secateur.search.profiling.runtimes import find_runtime, measure_latencies, open_session
from secateur.search.results.tables import amount, percent
from secateur.search.run.folder import read_json

VERIFY = "verify.json"
FLOAT_TOLERANCE = 1e-3
"""Largest difference of a logit in standard deviations of all logits, where both sides compute in float32."""

LEAST_AGREEMENT = 0.8
LARGEST_LOSS = 0.01
"""Of top-1, beyond twice the standard error."""

COST_TOLERANCE = 1e-6
"""Relative; costs are sums of whole numbers, latencies sums of table entries."""

SAME_TOP1 = 0.005
"""As in search/export/folder.py: another number of threads moves a last bit, and with it now and then an answer."""

SECONDS = 1.0
"""For how long each of the two networks is timed."""

REQUIRED = ("model", "policy", "budget", "costs", "scores", "data_config", "device", "execution", "files")
INPUT_ERROR = 2
"""Exit code of a process that was given what it cannot use."""


@dataclass(frozen=True)
class Outputs:
    """How the ONNX file answers, beside the network in PyTorch, on the test images.

    Attributes:
        images: how many.
        max_difference, mean_difference: of the logits, absolute, in standard deviations of all logits.
        agreement: share of images with the same answer.
        pytorch_top1, runtime_top1: of both.
        recorded_top1: what policy.json says of the network in PyTorch; None: nothing.
        exact: whether both compute in float32, so that the logits are judged; else the answers are.
        allowed_loss: of top-1, where the answers are judged.
    """

    images: int
    max_difference: float
    mean_difference: float
    agreement: float
    pytorch_top1: float
    runtime_top1: float
    recorded_top1: float | None
    exact: bool
    allowed_loss: float


@dataclass(frozen=True)
class Cost:
    """A cost that policy.json promises, and the same of the network that was loaded; None: not known of such layers."""

    name: str
    promised: float
    found: float | None


@dataclass(frozen=True)
class MeasuredLatency:
    """Milliseconds for one image: median, 10 % and 90 % quantiles of the export, and of the dense float32 network in turn.

    Attributes:
        promised: by the device file of the search; None: there was none.
        measured_here: whether that device is this machine, runtime and number of threads.
    """

    milliseconds: float
    low: float
    high: float
    dense_milliseconds: float
    dense_low: float
    dense_high: float
    repeats: int
    promised: float | None
    measured_here: bool


@dataclass(frozen=True)
class Limit:
    """A limit of the budget beside what was found.

    Attributes:
        name: of the cost, or "top1_drop".
        limit: the largest value that is allowed.
        found: None: it cannot be told here.
        how: where `found` comes from.
    """

    name: str
    limit: float
    found: float | None
    how: str

    @property
    def kept(self) -> bool | None:
        """Whether the limit is kept; None: it cannot be told here."""
        return None if self.found is None else self.found <= self.limit

    @property
    def margin(self) -> float | None:
        """What is left of the limit, as a share of it; negative if it is broken."""
        return None if self.found is None or not self.limit else 1 - self.found / self.limit


@dataclass(frozen=True)
class Verification:
    """What was found; verify.json holds it.

    Attributes:
        runtime, runtime_version, threads: what executed model.onnx.
        machine: on which processor.
        files: bytes of each file.
        outputs, costs, latency, limits: see there.
        failures: one sentence for every promise that is broken.
    """

    runtime: str
    runtime_version: str
    threads: int
    machine: dict[str, str]
    budget: str
    files: dict[str, int]
    outputs: Outputs
    costs: tuple[Cost, ...]
    latency: MeasuredLatency
    limits: tuple[Limit, ...]
    failures: tuple[str, ...]
    schema: int = 1

    @property
    def passed(self) -> bool:
        """Whether every limit and tolerance is kept."""
        return not self.failures


def verify_export(
    folder: str | Path,
    runtime: str = "onnxruntime",
    threads: int = 1,
    overrides: Sequence[str] = (),
    seconds: float = SECONDS,
) -> Verification:
    """Check an export from its files alone, and write verify.json into it.

    Args:
        folder: of the export.
        runtime: a key of `RUNTIMES`.
        threads: of the runtime.
        overrides: "data.key=value" texts, for data that has moved.
        seconds: for how long each network is timed.
    Raises:
        InputError: if a file is missing, damaged or was changed, the runtime is not installed, or the data cannot be read.
    """
    folder = Path(folder)
    version = find_runtime(runtime).version()
    document = read_export(folder)
    _check_complete(folder, document)
    check_files(folder, document)
    data = _load_data(document, overrides)
    network = load_compressed(folder)
    device = None if document["device"] is None else parse_device(document["device"], f"The device in {folder / POLICY}")
    outputs = _compare(network, folder, runtime, threads, data, document)
    images, labels = data.tensors(data.validation)
    validation_top1 = _top1(_torch_logits(network, images), labels)
    costs = _costs(network, document, device)
    latency = _latency(folder, runtime, threads, data, document, device, seconds)
    limits = _limits(document, costs, latency, validation_top1)
    failures = _failures(document, outputs, costs, limits, validation_top1)
    verification = Verification(
        runtime,
        version,
        threads,
        describe_machine(),
        document["budget"]["name"],
        {path.name: path.stat().st_size for path in sorted(folder.glob("model.*"))},
        outputs,
        costs,
        latency,
        limits,
        tuple(failures),
    )
    _write(folder / VERIFY, verification)
    return verification


def verify_in_fresh_process(
    folder: str | Path, runtime: str = "onnxruntime", threads: int = 1, overrides: Sequence[str] = ()
) -> Verification:
    """Return what `verify_export` finds in a process of its own, which knows nothing but the files.

    Raises:
        InputError: as `verify_export` does.
        RuntimeError: if the process fails otherwise.
    """
    # -P: nothing of the working directory is imported, whatever its files are called.
    command = [sys.executable, "-P", "-m", "secateur.search.export.verification", str(folder), runtime, str(threads), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == INPUT_ERROR:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        raise RuntimeError(f"Verifying {folder} in a fresh process failed:\n{done.stderr.strip()}")
    return read_verification(folder)


def read_verification(folder: str | Path) -> Verification:
    """Return what verify.json of an export says.

    Raises:
        InputError: if the export was not verified, or the file is damaged.
    """
    path = Path(folder) / VERIFY
    values = read_json(path, "a verified export")
    try:
        return TypeAdapter(Verification).validate_python(values)
    except ValidationError as errors:
        raise InputError(f"{path} is damaged: {errors.errors(include_url=False)[0]['msg']}.") from None


# ---------------------------------------------------------------------------------------------------------------- inputs


def _check_complete(folder: Path, document: Mapping[str, Any]) -> None:
    missing = [key for key in REQUIRED if key not in document]
    if missing:
        raise InputError(
            f"{folder / POLICY} has no `{missing[0]}`: it was changed, or an earlier version wrote it. Export it again."
        )


def _load_data(document: Mapping[str, Any], overrides: Sequence[str]) -> TaskData:
    """Return the splits that the export was scored on."""
    values = dict(document["data_config"])
    for text in overrides:
        key, equals, value = text.partition("=")
        section, _, name = key.strip().partition(".")
        if not equals or section != "data" or not name:
            raise InputError(f"--set {text}: must read data.key=value, for example data.root=data/images")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value  # a path needs no quotes
    try:
        section = DataSection.model_validate(values)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        raise InputError(f"`data.{'.'.join(map(str, error['loc']))}`: {error['msg']}.") from None
    return load_data(**section.model_dump(), input_shape=tuple(document["model"]["input"]))


# --------------------------------------------------------------------------------------------------------------- outputs


def _compare(
    network: nn.Module, folder: Path, runtime: str, threads: int, data: TaskData, document: Mapping[str, Any]
) -> Outputs:
    images, labels = data.tensors(data.test)
    session = open_session(folder / ONNX, runtime, threads)
    simulated = _torch_logits(network, images)
    executed = np.concatenate([session.run(batch.numpy()) for batch in batches(images)])
    difference = np.abs(executed - simulated) / max(float(simulated.std()), np.finfo(np.float32).tiny)
    test = document["scores"]["test"]
    return Outputs(
        len(labels),
        float(difference.max()),
        float(difference.mean()),
        float((executed.argmax(1) == simulated.argmax(1)).mean()),
        _top1(simulated, labels),
        _top1(executed, labels),
        None if test is None else test["top1"],
        all(layer["executed"] == "float32" and layer["activation_bits"] == FLOAT_BITS for layer in document["execution"]),
        _allowed_loss(simulated, executed, labels.numpy()),
    )


@torch.inference_mode()
def _torch_logits(network: nn.Module, images: Tensor) -> np.ndarray:
    return torch.cat([network(batch) for batch in batches(images)]).numpy()


def _top1(logits: np.ndarray, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels.numpy()).mean())


def _allowed_loss(simulated: np.ndarray, executed: np.ndarray, labels: np.ndarray) -> float:
    """Return by how much top-1 may be lower: images that both have right, or both wrong, say nothing of the difference."""
    differing = (simulated.argmax(1) == labels) != (executed.argmax(1) == labels)
    return LARGEST_LOSS + 2 * float(np.sqrt(differing.sum())) / len(labels)


# ----------------------------------------------------------------------------------------------------- costs and latency


def _costs(network: nn.Module, document: Mapping[str, Any], device: Device | None) -> tuple[Cost, ...]:
    """Return every promised cost beside that of the loaded network, which is analyzed like a model never seen before."""
    models: dict[str, CostModel] = {name: model() for name, model in COST_MODELS.items()}
    models |= {} if device is None else device.cost_models()
    shapes = _shapes(network, document["model"]["input"])
    found = {}
    for name in document["costs"]:
        try:
            found[name] = float(models[name].total(shapes)[0]) if name in models else None
        except InputError:  # a table has no times for what is left of a layer: a depthwise one with one channel, say
            found[name] = None
    return tuple(Cost(name, promised, found[name]) for name, promised in document["costs"].items())


def _shapes(network: nn.Module, image_shape: Sequence[int]) -> LayerShapes:
    """Return the shapes and bits of a compressed network, (1, ...) each."""
    weights = {name: weight.bits for name, module in network.named_modules() if (weight := quantized_weight(module))}
    inputs = {name: grid.bits for name, module in network.named_modules() if (grid := activation_grid(module))}
    plain = copy.deepcopy(network)
    for module in plain.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, ActivationQuantizer)]:
            del module._forward_pre_hooks[key]
    geometry = analyze(plain, (torch.zeros(1, *image_shape),), verify=False).geometry
    bits = [[known.get(layer.name, FLOAT_BITS) for layer in geometry.layers] for known in (weights, inputs)]
    return geometry.shapes(None, *map(np.array, bits))


def _latency(
    folder: Path,
    runtime: str,
    threads: int,
    data: TaskData,
    document: Mapping[str, Any],
    device: Device | None,
    seconds: float,
) -> MeasuredLatency:
    """Measure the export and, in turn with it, the dense network in float32: times do not depend on the values of weights."""
    table = None if device is None else device.table
    same = table is not None and (table.runtime, table.threads) == (runtime, threads)
    precision = device.float_precision if same else "float32"
    images = data.tensors(data.test)[0][: table.batch if same else 1]
    with TemporaryDirectory() as temporary:
        dense = build_dense(document["model"]).float().eval()
        shape = document["model"]["input"]
        graph = analyze(dense, (torch.zeros(1, *shape),), verify=False)
        export_onnx(dense, graph, shape, images, Path(temporary) / ONNX)
        files = (folder / ONNX, Path(temporary) / ONNX)
        sessions = [open_session(file, runtime, threads, precision) for file in files]
        ours, theirs = measure_latencies(sessions, images.numpy(), seconds)
    return MeasuredLatency(
        ours.milliseconds,
        ours.low,
        ours.high,
        theirs.milliseconds,
        theirs.low,
        theirs.high,
        ours.repeats,
        document["costs"].get("latency_ms"),
        same and device.machine == describe_machine(),
    )


# --------------------------------------------------------------------------------------------------------------- verdict


def _limits(
    document: Mapping[str, Any], costs: Sequence[Cost], latency: MeasuredLatency, validation_top1: float
) -> tuple[Limit, ...]:
    budget = document["budget"]
    recomputed = {cost.name: cost.found for cost in costs}
    limits = []
    for name, limit in budget["limits"].items():
        if name != "latency_ms":
            limits.append(Limit(name, limit, recomputed.get(name), "computed from the files"))
        elif latency.measured_here:
            limits.append(Limit(name, limit, latency.milliseconds, "measured"))
        else:
            limits.append(Limit(name, limit, None, "not measured here: another processor, runtime or number of threads"))
    if budget["top1_drop"] is not None:
        drop = document["scores"]["dense_validation"]["top1"] - validation_top1
        limits.append(Limit("top1_drop", budget["top1_drop"], drop, "PyTorch on the validation images"))
    return tuple(limits)


def _failures(
    document: Mapping[str, Any], outputs: Outputs, costs: Sequence[Cost], limits: Sequence[Limit], validation_top1: float
) -> list[str]:
    """Return one sentence for everything that is broken."""
    failures = [
        f"{limit.name} is {amount(limit.name, limit.found)} ({limit.how}), but the budget allows "
        f"{amount(limit.name, limit.limit)}."
        for limit in limits
        if limit.kept is False
    ]
    failures += [
        f"{cost.name} of the files is {cost.found:,.6g}, but {POLICY} promises {cost.promised:,.6g}."
        for cost in costs
        if cost.found is not None and not math.isclose(cost.found, cost.promised, rel_tol=COST_TOLERANCE)
    ]
    scores = {"validation": (validation_top1, document["scores"]["validation"]["top1"])}
    if outputs.recorded_top1 is not None:
        scores["test"] = (outputs.pytorch_top1, outputs.recorded_top1)
    failures += [
        f"The {name} top-1 is {percent(found)} in PyTorch, but {POLICY} says {percent(recorded)}."
        for name, (found, recorded) in scores.items()
        if abs(found - recorded) > SAME_TOP1
    ]
    loss = outputs.pytorch_top1 - outputs.runtime_top1
    if outputs.exact and not outputs.max_difference <= FLOAT_TOLERANCE:  # not: NaN fails too
        failures.append(
            f"A logit of {ONNX} differs by {outputs.max_difference:.3g} standard deviations from PyTorch's; allowed are "
            f"{FLOAT_TOLERANCE:g}."
        )
    if not outputs.exact and outputs.agreement < LEAST_AGREEMENT:
        failures.append(
            f"{ONNX} and PyTorch give the same answer for {percent(outputs.agreement)} of the images; "
            f"{percent(LEAST_AGREEMENT)} are needed."
        )
    if not outputs.exact and loss > outputs.allowed_loss:
        failures.append(
            f"{ONNX} has {percent(outputs.runtime_top1)} top-1, PyTorch {percent(outputs.pytorch_top1)}; allowed are "
            f"{100 * outputs.allowed_loss:.2f} points less."
        )
    return failures


def _write(path: Path, verification: Verification) -> None:
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        draft.write_text(json.dumps(asdict(verification), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}. Copy the export to where you may write.") from None


def verification_tables(verification: Verification) -> list[Table]:
    """Return what was found: the limits, then everything else."""
    return [table for table in (_limit_table(verification), _promise_table(verification)) if table.row_count]


def _limit_table(verification: Verification) -> Table:
    table = Table(title=f"Budget {verification.budget}", title_justify="left")
    for heading in ("limit", "allowed", "found", "margin"):
        table.add_column(heading, justify="left" if heading == "limit" else "right")
    for heading in ("how", "kept"):
        table.add_column(heading)
    for limit in verification.limits:
        shown = percent if limit.name == "top1_drop" else partial(amount, limit.name)
        found = "-" if limit.found is None else shown(limit.found)
        margin = "-" if limit.margin is None else percent(limit.margin, 1)
        kept = {None: "-", True: "[green]yes[/]", False: "[red]no[/]"}[limit.kept]
        table.add_row(limit.name, shown(limit.limit), found, margin, limit.how, kept)
    return table


def _promise_table(verification: Verification) -> Table:
    outputs, latency = verification.outputs, verification.latency
    threads = f"{verification.threads} thread{'s' * (verification.threads != 1)}"
    title = f"{verification.runtime} {verification.runtime_version}, {threads}, {verification.machine['processor']}"
    table = Table("quantity", title=title, title_justify="left")
    for heading in ("promised", "found"):
        table.add_column(heading, justify="right")
    recorded = "" if outputs.recorded_top1 is None else percent(outputs.recorded_top1)
    table.add_row(f"top-1 on {outputs.images:,} test images, PyTorch", recorded, percent(outputs.pytorch_top1))
    table.add_row(f"top-1, {ONNX}", "", percent(outputs.runtime_top1))
    table.add_row("same answers", "" if outputs.exact else f">= {percent(LEAST_AGREEMENT, 0)}", percent(outputs.agreement))
    allowed = f"<= {FLOAT_TOLERANCE:g}" if outputs.exact else ""
    table.add_row("largest difference of a logit, in standard deviations", allowed, f"{outputs.max_difference:.3g}")
    table.add_row("mean difference", "", f"{outputs.mean_difference:.3g}")
    table.add_section()
    for cost in verification.costs:
        table.add_row(cost.name, amount(cost.name, cost.promised), "-" if cost.found is None else amount(cost.name, cost.found))
    for name, size in verification.files.items():
        table.add_row(name, "", amount("file_bytes", size))
    table.add_section()
    # What another device promises is listed among the costs; beside times of this machine it would say nothing.
    promised = f"{latency.promised:.3f} ms" if latency.measured_here and latency.promised is not None else ""
    quantiles = f"{latency.milliseconds:.3f} ms ({latency.low:.3f} to {latency.high:.3f})"
    dense = f"{latency.dense_milliseconds:.3f} ms ({latency.dense_low:.3f} to {latency.dense_high:.3f})"
    table.add_row("latency, median (10 % to 90 %)", promised, quantiles)
    table.add_row("latency of the dense network, float32", "", dense)
    table.add_row("times as fast", "", f"{latency.dense_milliseconds / latency.milliseconds:.2f}")
    return table


def main(arguments: Sequence[str]) -> int:
    """Verify and return the exit code: 0 if verify.json was written, 2 for what the caller has to change."""
    folder, runtime, threads, *overrides = arguments
    try:
        verify_export(folder, runtime, int(threads), overrides)
    except InputError as error:
        print(error, file=sys.stderr)
        return INPUT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
