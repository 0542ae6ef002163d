"""Checks what an export promises, from its files alone: outputs, scores, costs, and the latency, which is measured.

Tolerances of the ONNX file against the network in PyTorch:
- All layers in float32, and no input with bits: the two differ by the order of sums. No logit may differ by more than 0.1 % of
  the logits' standard deviation (measured: below 0.001 %).
- Otherwise the arithmetic differs by design (see onnx_export.py), and the answers are judged: at least 80 % of them must be the
  same, and top-1 must not be lower by more than 1 point and twice the standard error of that difference. Measured on
  ResNet-56, 2,000 images: 99.3 % and 0.1 points at 8 bits, 95.5 % and no loss at 4; MobileNetV2 and SqueezeNet with their
  1,000 classes at 8 bits: 93 and 94 %, where the simulation itself gives 95 and 94 % of the dense network's answers. A wrong
  grid or code costs tens of points.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import FLOAT_BITS, CostModel, LayerShapes
from secateur.cost_models.device import Device, parse_device
from secateur.cost_models.latency_table import TableLatency
from secateur.envs.core import InputError
from secateur.envs.evaluator import batches
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.fake_quantize import ActivationQuantizer, activation_grid, quantized_weight
from secateur.envs.tasks.data import TaskData, load_data
from secateur.search.config import DataSection, Overrides, apply_overrides
from secateur.search.export.execution import recorded_execution
from secateur.search.export.files import ONNX, POLICY, check_files, read_export
from secateur.search.export.load import Factory, build_dense, load_compressed
from secateur.search.export.onnx_export import export_onnx
from secateur.search.export.verification import (
    Cost,
    LimitCheck,
    MeasuredLatency,
    Outputs,
    Verification,
    read_verification,
    write_verification,
)
from secateur.search.named_code import check_data_name
from secateur.search.profiling.profiler import describe_machine
from secateur.search.profiling.runtimes import find_runtime, measure_latencies, open_session
from secateur.search.results.formatting import amount, percent

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a logit in standard deviations of all logits, where both sides compute in float32."""

LEAST_AGREEMENT = 0.8
LARGEST_LOSS = 0.01
"""Of top-1, beyond twice the standard error."""

COST_TOLERANCE = 1e-6
"""Relative; costs are sums of whole numbers, latencies sums of table entries."""

SAME_TOP1 = 0.005
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
) -> Verification:
    """Check an export from its files alone, and write verify.json into it.

    Args:
        folder: of the export.
        runtime: a key of `RUNTIMES`.
        threads: of the runtime.
        overrides: ["data.root=FOLDER"] or {"data.root": FOLDER}, for data that has moved.
        seconds: how long each network is timed.
        factory: factory of the network, for one that a policy.json of somebody else could not name; see `load_compressed`.
    Raises:
        InputError: if a file is missing, damaged or was changed, the runtime is not installed, or the data cannot be read.
    """
    folder = Path(folder)
    version = find_runtime(runtime).version()
    document = read_export(folder)
    _check_complete(folder, document)
    check_files(folder, document)
    data = _load_data(document, overrides)
    network = load_compressed(folder, factory)
    device = None if document["device"] is None else parse_device(document["device"], f"The device in {folder / POLICY}")
    outputs = _compare(network, folder, runtime, threads, data, document)
    images, labels = data.tensors(data.validation)
    validation_top1 = _top1(_torch_logits(network, images), labels)
    costs = _costs(network, document, device)
    latency = _latency(folder, runtime, threads, data, document, device, seconds, factory)
    limits = check_limits(document, costs, latency, validation_top1)
    failures = find_failures(document, outputs, costs, limits, validation_top1)
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
    write_verification(folder, verification)
    return verification


def verify_in_fresh_process(
    folder: str | Path, runtime: str = "onnxruntime", threads: int = 1, overrides: Sequence[str] = (), factory: str = ""
) -> Verification:
    """Return the result of `verify_export` in a process of its own, which has nothing but the files.

    Args:
        folder, runtime, threads, overrides: see `verify_export`.
        factory: name of the network's factory; "": that of policy.json.
    Raises:
        InputError: as `verify_export` does.
        RuntimeError: if the process fails otherwise.
    """
    # -P: the working directory is not put before the standard library and the installed packages.
    command = [sys.executable, "-P", "-m", "secateur.search.export.verify", str(folder), runtime, str(threads)]
    command += [factory, *overrides]
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


def _load_data(document: Mapping[str, Any], overrides: Overrides) -> TaskData:
    """Return the splits that the export was scored on."""
    values = {"data": dict(document["data_config"])}
    changed = apply_overrides(values, overrides)
    check_data_name(str(values["data"].get("name")), changed, POLICY)
    for key in changed:
        if not key.startswith("data."):
            reason = "must start with `data.`, for example data.root=data/images"
            raise InputError(f"overrides: {key}: {reason}", f"--set {key}: {reason}")
    try:
        section = DataSection.model_validate(values["data"])
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
    """Return by how much top-1 may be lower; only images that one of the two answers correctly tell of a difference."""
    differing = (simulated.argmax(1) == labels) != (executed.argmax(1) == labels)
    return LARGEST_LOSS + 2 * float(np.sqrt(differing.sum())) / len(labels)


# ----------------------------------------------------------------------------------------------------- costs and latency


def _costs(network: nn.Module, document: Mapping[str, Any], device: Device | None) -> tuple[Cost, ...]:
    """Return every promised cost and that of the loaded network, which is analyzed like an unknown model."""
    models: dict[str, CostModel] = {name: model() for name, model in COST_MODELS.items()}
    models |= {} if device is None else device.cost_models()
    shapes = _shapes(network, document["model"]["input"])
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


def _shapes(network: nn.Module, image_shape: Sequence[int]) -> LayerShapes:
    """Return the shapes and bits of a compressed network, (1, ...) each."""
    weights = {name: weight.bits for name, module in network.named_modules() if (weight := quantized_weight(module))}
    inputs = {name: grid.bits for name, module in network.named_modules() if (grid := activation_grid(module))}
    plain = copy.deepcopy(network)
    for module in plain.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, ActivationQuantizer)]:
            del module._forward_pre_hooks[key]
    geometry = analyze(plain, (torch.zeros(1, *image_shape),), verify=False).geometry
    bits = [[of_layer.get(layer.name, FLOAT_BITS) for layer in geometry.layers] for of_layer in (weights, inputs)]
    return geometry.shapes(None, *map(np.array, bits))


def _latency(
    folder: Path,
    runtime: str,
    threads: int,
    data: TaskData,
    document: Mapping[str, Any],
    device: Device | None,
    seconds: float,
    factory: Factory,
) -> MeasuredLatency:
    """Measure the export and the dense network in float32, in turns. Times do not depend on the values of weights."""
    table = None if device is None else device.table
    precision, batch, here = "float32", 1, False
    if device is not None and table is not None and (table.runtime, table.threads) == (runtime, threads):
        precision, batch, here = device.float_precision, table.batch, device.machine == describe_machine()
    images = data.tensors(data.test)[0][:batch]
    with TemporaryDirectory() as temporary:
        dense = build_dense(document["model"], factory).float().eval()
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
        here,
    )


# --------------------------------------------------------------------------------------------------------------- verdict


def check_limits(
    document: Mapping[str, Any], costs: Sequence[Cost], latency: MeasuredLatency, validation_top1: float
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
    if budget["top1_drop"] is not None:
        drop = document["scores"]["dense_validation"]["top1"] - validation_top1
        limits.append(LimitCheck("top1_drop", budget["top1_drop"], drop, "PyTorch on the validation images"))
    return tuple(limits)


def find_failures(
    document: Mapping[str, Any], outputs: Outputs, costs: Sequence[Cost], limits: Sequence[LimitCheck], validation_top1: float
) -> list[str]:
    """Return one sentence for every limit, cost, score or output that is not as promised."""
    failures = [
        f"{limit.name} is {amount(limit.name, limit.found)} ({limit.how}), but the budget allows "
        f"{amount(limit.name, limit.limit)}."
        for limit in limits
        if limit.found is not None and limit.kept is False
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
    return failures + _output_failures(outputs)


def _output_failures(outputs: Outputs) -> list[str]:
    if outputs.exact:
        if outputs.max_difference <= FLOAT_TOLERANCE:
            return []
        return [
            f"A logit of {ONNX} differs by {outputs.max_difference:.3g} standard deviations from PyTorch's; allowed are "
            f"{FLOAT_TOLERANCE:g}."
        ]  # also if the difference is NaN
    failures = []
    if outputs.agreement < LEAST_AGREEMENT:
        failures.append(
            f"{ONNX} and PyTorch give the same answer for {percent(outputs.agreement)} of the images; "
            f"{percent(LEAST_AGREEMENT)} are needed."
        )
    if outputs.pytorch_top1 - outputs.runtime_top1 > outputs.allowed_loss:
        failures.append(
            f"{ONNX} has {percent(outputs.runtime_top1)} top-1, PyTorch {percent(outputs.pytorch_top1)}; allowed are "
            f"{100 * outputs.allowed_loss:.2f} points less."
        )
    return failures


def main(arguments: Sequence[str]) -> int:
    """Verify and return the exit code: 0 if verify.json was written, 2 if the input cannot be used."""
    folder, runtime, threads, factory, *overrides = arguments
    try:
        verify_export(folder, runtime, int(threads), overrides, factory=factory or None)
    except InputError as error:
        print(error, file=sys.stderr)
        return INPUT_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
