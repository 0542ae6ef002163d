"""Checks what an export promises, from its files alone: outputs, scores, costs, and the latency, which is measured.

Tolerances of the ONNX file against the network in PyTorch:
- All layers in float32, and no input with bits: the two differ by the order of sums. No logit may differ by more than 0.1 % of
  the logits' standard deviation (measured: below 0.001 %).
- Otherwise the arithmetic differs by design (see onnx_export.py), and the answers are judged: at least 80 % of them must be the
  same, and the score must not be worse by more than 1 % of its range and twice the standard error of that difference. Measured on
  ResNet-56, 2,000 images: 99.3 % and 0.1 points at 8 bits, 95.5 % and no loss at 4; MobileNetV2 and SqueezeNet with their
  1,000 classes at 8 bits: 93 and 94 %, where the simulation itself gives 95 and 94 % of the dense network's answers. A wrong
  grid or code costs tens of points.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import FLOAT_BITS, CostModel, LayerShapes
from secateur.cost_models.device import Device, parse_device
from secateur.cost_models.latency_table import TableLatency
from secateur.envs.core import InputError
from secateur.envs.inputs import Inputs, call_model, described_inputs, positional, tensors_of_inputs
from secateur.envs.metric import Metric, drop_name, loss_of
from secateur.envs.model_graph import analyze
from secateur.envs.parts import PartTask, parts_of, take_parts
from secateur.envs.quantization.fake_quantize import ActivationQuantizer, activation_grid, quantized_weight
from secateur.envs.tasks.core import Metrics, Task, first_inputs, tensors_of
from secateur.search.config import Overrides
from secateur.search.export.execution import recorded_execution
from secateur.search.export.files import ONNX, POLICY, check_files, read_export
from secateur.search.export.load import Factory, build_dense, load_compressed
from secateur.search.export.onnx_export import export_onnx
from secateur.search.export.runtime_model import RuntimeModel
from secateur.search.export.tasks import load_task
from secateur.search.export.verification import (
    Cost,
    LimitCheck,
    MeasuredLatency,
    Outputs,
    Verification,
    read_verification,
    write_verification,
)
from secateur.search.profiling.profiler import describe_machine
from secateur.search.profiling.runtimes import find_runtime, measure_latencies, open_session
from secateur.search.results.formatting import amount, percent
from secateur.search.run.folder import check_links
from secateur.search.schema import metric_of

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a logit in standard deviations of all logits, where both sides compute in float32."""

LEAST_AGREEMENT = 0.8
LARGEST_LOSS = 0.01
"""Of the quality (for top-1: 1 point), beyond twice the standard error."""

COST_TOLERANCE = 1e-6
"""Relative; costs are sums of whole numbers, latencies sums of table entries."""

SAME_QUALITY = 0.005
"""As in search/export/write.py: another number of threads changes the last bits, and with them sometimes an answer."""

SECONDS = 1.0
"""How long each of the two networks is timed."""

REQUIRED = ("model", "policy", "budget", "costs", "scores", "data_config", "device", "execution", "files")
INPUT_ERROR = 2
"""Exit code of a process whose input cannot be used."""


def verify_export(
    folder: str | Path,
    runtime: str = "onnxruntime",
    threads: int = 1,
    overrides: Overrides = (),
    seconds: float = SECONDS,
    factory: Factory = None,
    task: Task | None = None,
    trust: Collection[str] = (),
) -> Verification:
    """Check an export from its files alone, and write verify.json into it.

    Args:
        folder: of the export.
        runtime: a key of `RUNTIMES`.
        threads: of the runtime.
        overrides: ["data.root=FOLDER"] or {"data.root": FOLDER}, for data that has moved.
        seconds: how long each network is timed.
        factory: factory of the network, in place of the one that policy.json names; see `load_compressed`.
        task: scores the model, in place of the task and the data that policy.json names.
        trust: modules that policy.json may name; see `load_compressed`.
    Raises:
        InputError: if a file is missing, damaged or was changed, the runtime is not installed, or the data cannot be read.
    """
    folder = Path(folder)
    version = find_runtime(runtime).version()
    check_links(folder)
    document = read_export(folder)
    _check_complete(folder, document)
    check_files(folder, document)
    task = load_task(document, overrides, factory, trust) if task is None else task
    network = load_compressed(folder, factory, trust=trust)
    if paths := document["model"].get("part"):
        task, network = take_parts(task if not isinstance(task, PartTask) else task.task, network, paths)
    device = None if document["device"] is None else parse_device(document["device"], f"The device in {folder / POLICY}")
    outputs = _compare(network, folder, runtime, threads, task, document)
    validation = task.evaluate(network, "validation").score
    costs = _costs(network, document, device)
    latency = _latency(folder, runtime, threads, task, document, device, seconds, factory, trust)
    limits = check_limits(document, costs, latency, validation)
    failures = find_failures(document, outputs, costs, limits, validation)
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
        asdict(task.metric),
    )
    write_verification(folder, verification)
    return verification


def verify_in_fresh_process(
    folder: str | Path, runtime: str = "onnxruntime", threads: int = 1, trust: Sequence[str] = ()
) -> Verification:
    """Return the result of `verify_export` in a process of its own, which has nothing but the files.

    Args:
        folder, runtime, threads, trust: see `verify_export`.
    Raises:
        InputError: as `verify_export` does.
        RuntimeError: if the process fails otherwise.
    """
    # -P: the working directory is not put before the standard library and the installed packages.
    command = [sys.executable, "-P", "-m", "secateur.search.export.verify", str(folder), runtime, str(threads), *trust]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == INPUT_ERROR:
        raise InputError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        raise RuntimeError(f"Verifying {folder} in a fresh process failed:\n{done.stderr.strip()}")
    return read_verification(folder)


# ---------------------------------------------------------------------------------------------------------------- inputs


def _check_complete(folder: Path, document: Mapping[str, Any]) -> None:
    missing = [key for key in REQUIRED if key not in document]
    if missing:
        raise InputError(
            f"{folder / POLICY} has no `{missing[0]}`: it was changed, or an earlier version wrote it. Export it again."
        )


# --------------------------------------------------------------------------------------------------------------- outputs


def _compare(network: nn.Module, folder: Path, runtime: str, threads: int, task: Task, document: Mapping[str, Any]) -> Outputs:
    example = first_inputs(task, "test", 1)[0]
    executed = RuntimeModel(open_session(folder / ONNX, runtime, threads), network, example)
    largest, mean, agreement = _output_differences(task, network, executed)
    simulated_metrics, executed_metrics = task.evaluate(network, "test"), task.evaluate(executed, "test")
    test = document["scores"]["test"]
    return Outputs(
        simulated_metrics.samples,
        largest,
        mean,
        agreement,
        simulated_metrics.score,
        executed_metrics.score,
        None if test is None else test["score"],
        all(layer["executed"] == "float32" and layer["activation_bits"] == FLOAT_BITS for layer in document["execution"]),
        _allowed_loss(metric_of(document), _dense_score(document), simulated_metrics, executed_metrics),
    )


@torch.inference_mode()
def _output_differences(task: Task, network: nn.Module, executed: nn.Module) -> tuple[float, float, float | None]:
    """Return largest and mean difference of an output in its tensor's standard deviations, and the share of equal answers."""
    differences: list[list[np.ndarray]] = []
    wanted_values: list[list[np.ndarray]] = []
    agreements = []
    for inputs, _ in task.batches("test"):
        wanted, found = call_model(network, inputs), call_model(executed, inputs)
        tensors = list(zip(tensors_of(wanted), tensors_of(found), strict=True))
        differences.append([(b - a).abs().numpy().ravel() for a, b in tensors])
        wanted_values.append([a.numpy().ravel() for a, _ in tensors])
        agreements.append(task.agreement(wanted, found))
    shares = [
        np.concatenate(difference) / _scale(np.concatenate(values))
        for difference, values in zip(zip(*differences, strict=True), zip(*wanted_values, strict=True), strict=True)
    ]
    equal = (
        None if agreements[0] is None else float(np.concatenate([shared for shared in agreements if shared is not None]).mean())
    )
    return max(float(share.max()) for share in shares), float(np.mean([share.mean() for share in shares])), equal


def _scale(values: np.ndarray) -> float:
    """Return the standard deviation of an output, or 1 % of its size if it hardly varies: rounding errors follow the size."""
    size = float(np.sqrt(np.square(values, dtype=float).mean()))
    return max(float(values.std()), 0.01 * size, float(np.finfo(np.float32).tiny))


def _dense_score(document: Mapping[str, Any]) -> float:
    return document["scores"]["dense_validation"]["score"]


def _allowed_loss(metric: Metric, dense: float, simulated: Metrics, executed: Metrics) -> float:
    """Return by how much the score may be worse; samples that both score alike tell of no difference."""
    allowed = abs(loss_of(metric, LARGEST_LOSS, simulated.score, dense))
    if simulated.contributions is None or executed.contributions is None:
        return allowed
    differences = simulated.contributions.astype(float) - executed.contributions.astype(float)
    return allowed + 2 * float(np.sqrt(np.square(differences).sum())) / len(differences)


# ----------------------------------------------------------------------------------------------------- costs and latency


def _costs(network: nn.Module, document: Mapping[str, Any], device: Device | None) -> tuple[Cost, ...]:
    """Return every promised cost and that of the loaded network, which is analyzed like an unknown model."""
    models: dict[str, CostModel] = {name: model() for name, model in COST_MODELS.items()}
    models |= {} if device is None else device.cost_models()
    shapes = shapes_of(network, described_inputs(document["model"]))
    found: dict[str, float | None] = {}
    for name in document["costs"]:
        try:
            found[name] = _cost(models[name], shapes, document) if name in models else None
        except InputError:  # a table may have no times for such a layer, for example a depthwise one with one channel left
            found[name] = None
    return tuple(Cost(name, promised, found[name]) for name, promised in document["costs"].items())


def _cost(model: CostModel, shapes: LayerShapes, document: Mapping[str, Any]) -> float:
    """Return a cost of the network in the files; a latency is that of the execution that policy.json records."""
    if isinstance(model, TableLatency):
        return float(model.total(shapes, recorded_execution(document["execution"], shapes, model.integer_bits))[0])
    return float(model.total(shapes)[0])


def shapes_of(network: nn.Module, example: Inputs) -> LayerShapes:
    """Return the shapes and bits of a compressed network, (1, ...) each."""
    weights = {name: weight.bits for name, module in network.named_modules() if (weight := quantized_weight(module))}
    inputs = {name: grid.bits for name, module in network.named_modules() if (grid := activation_grid(module))}
    plain = copy.deepcopy(network)
    for module in plain.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, ActivationQuantizer)]:
            del module._forward_pre_hooks[key]
    geometry = analyze(positional(plain, example), tuple(tensors_of_inputs(example)), verify=False).geometry
    bits = [[of_layer.get(layer.name, FLOAT_BITS) for layer in geometry.layers] for of_layer in (weights, inputs)]
    return geometry.shapes(None, *map(np.array, bits))


def _latency(
    folder: Path,
    runtime: str,
    threads: int,
    task: Task,
    document: Mapping[str, Any],
    device: Device | None,
    seconds: float,
    factory: Factory,
    trust: Collection[str],
) -> MeasuredLatency:
    """Measure the export and the dense network in float32, in turns. Times do not depend on the values of weights."""
    table = None if device is None else device.table
    precision, batch, here = "float32", 1, False
    if device is not None and table is not None and (table.runtime, table.threads) == (runtime, threads):
        precision, batch, here = device.float_precision, table.batch, device.machine == describe_machine()
    images = first_inputs(task, "test", batch)[0]
    with TemporaryDirectory() as temporary:
        dense = build_dense(document["model"], factory, trust).float().eval()
        dense = parts_of(task, dense)
        example = described_inputs(document["model"])
        graph = analyze(positional(dense, example), tuple(tensors_of_inputs(example)), verify=False)
        export_onnx(dense, graph, images, Path(temporary) / ONNX)
        files = (folder / ONNX, Path(temporary) / ONNX)
        sessions = [open_session(file, runtime, threads, precision) for file in files]
        ours, theirs = measure_latencies(sessions, [x.numpy() for x in tensors_of_inputs(images)], seconds)
    return MeasuredLatency(
        ours.milliseconds,
        ours.low,
        ours.high,
        theirs.milliseconds,
        theirs.low,
        theirs.high,
        ours.repeats,
        document["costs"].get("latency_ms"),
        here,
    )


# --------------------------------------------------------------------------------------------------------------- verdict


def check_limits(
    document: Mapping[str, Any], costs: Sequence[Cost], latency: MeasuredLatency, validation: float
) -> tuple[LimitCheck, ...]:
    """Return every limit of the budget with the value that was found.

    A latency limit in percent is compared with the dense network, which was measured in turn with the export: whatever slows
    the machine down at that time slows down both.
    """
    budget = document["budget"]
    recomputed = {cost.name: cost.found for cost in costs}
    share = budget.get("shares", {}).get("latency_ms")  # exports of earlier versions have no shares
    limits = []
    for name, limit in budget["limits"].items():
        if name != "latency_ms":
            limits.append(LimitCheck(name, limit, recomputed.get(name), "computed from the files"))
        elif not latency.measured_here:
            limits.append(LimitCheck(name, limit, None, "not measured here: another processor, runtime or number of threads"))
        elif share is None:
            limits.append(LimitCheck(name, limit, latency.milliseconds, "measured"))
        else:
            how = f"measured; {percent(share, 1)} of the dense network"
            limits.append(LimitCheck(name, share * latency.dense_milliseconds, latency.milliseconds, how))
    if budget["metric_drop"] is not None:
        metric = metric_of(document)
        drop = metric.drop(validation, _dense_score(document))
        limits.append(LimitCheck(drop_name(metric), budget["metric_drop"], drop, "PyTorch on the validation split"))
    return tuple(limits)


def find_failures(
    document: Mapping[str, Any], outputs: Outputs, costs: Sequence[Cost], limits: Sequence[LimitCheck], validation: float
) -> list[str]:
    """Return one sentence for every limit, cost, score or output that is not as promised."""
    metric = metric_of(document)

    def shown(limit: LimitCheck, value: float) -> str:
        return metric.difference(value) if limit.name == drop_name(metric) else amount(limit.name, value)

    failures = [
        f"{limit.name} is {shown(limit, limit.found)} ({limit.how}), but the budget allows {shown(limit, limit.limit)}."
        for limit in limits
        if limit.found is not None and limit.kept is False
    ]
    failures += [
        f"{cost.name} of the files is {cost.found:,.6g}, but {POLICY} promises {cost.promised:,.6g}."
        for cost in costs
        if cost.found is not None and not math.isclose(cost.found, cost.promised, rel_tol=COST_TOLERANCE)
    ]
    scores = {"validation": (validation, document["scores"]["validation"]["score"])}
    if outputs.recorded_score is not None:
        scores["test"] = (outputs.pytorch_score, outputs.recorded_score)
    dense = _dense_score(document)
    failures += [
        f"The {name} {metric.label} is {metric.text(found)} in PyTorch, but {POLICY} says {metric.text(recorded)}."
        for name, (found, recorded) in scores.items()
        if abs(metric.quality(found, dense) - metric.quality(recorded, dense)) > SAME_QUALITY
    ]
    return failures + _output_failures(outputs, metric)


def _output_failures(outputs: Outputs, metric: Metric) -> list[str]:
    if outputs.exact:
        if outputs.max_difference <= FLOAT_TOLERANCE:
            return []
        return [
            f"An output of {ONNX} differs by {outputs.max_difference:.3g} standard deviations from PyTorch's; allowed are "
            f"{FLOAT_TOLERANCE:g}."
        ]  # also if the difference is NaN
    failures = []
    if outputs.agreement is not None and outputs.agreement < LEAST_AGREEMENT:
        failures.append(
            f"{ONNX} and PyTorch give the same answer for {percent(outputs.agreement)} of the images; "
            f"{percent(LEAST_AGREEMENT)} are needed."
        )
    if metric.drop(outputs.runtime_score, outputs.pytorch_score) > outputs.allowed_loss:
        failures.append(
            f"{ONNX} has {metric.text(outputs.runtime_score)} {metric.label}, PyTorch "
            f"{metric.text(outputs.pytorch_score)}; allowed are "
            f"{metric.difference(round(outputs.allowed_loss, 6))} less."
        )
    return failures


def main(arguments: Sequence[str]) -> int:
    """Verify and return the exit code: 0 if verify.json was written, 2 if the input cannot be used."""
    folder, runtime, threads, *trust = arguments
    try:
        verify_export(folder, runtime, int(threads), trust=trust)
    except InputError as error:
        print(error, file=sys.stderr)
        return INPUT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
