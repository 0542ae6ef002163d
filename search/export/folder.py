"""Writes a compressed model to a folder and builds it again: JSON, safetensors and ONNX, no pickles.

policy.json         what was chosen, kept, scored and promised; everything but the numbers of the network
model.safetensors   its tensors; the weights of quantized layers as packed integer codes and one scale per channel
model.onnx          the same network for runtimes: layers with at most 8 bits in integers, batch norms folded
model.pt2           if asked for: the network with simulated quantization as torch.export has it, needs no code of the model
README.md           how to load it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.policy_space import document_to_policy, policy_to_document
from secateur.envs.pruning.slicing import resize_model
from secateur.envs.quantization.fake_quantize import (
    activation_grid,
    quantized_weight,
    set_activation_grid,
    set_quantized_weight,
)
from secateur.envs.quantization.packing import pack_bits, unpack_bits
from secateur.envs.quantization.quantizers import ActivationGrid, QuantizedWeight
from secateur.envs.tasks.models import build_model, call_factory, find_factory, is_model_factory
from secateur.search.export.onnx_export import LayerExecution, export_onnx
from secateur.search.results.finalize import finalist_scores
from secateur.search.results.front import winner
from secateur.search.run.folder import read_json

if TYPE_CHECKING:
    from secateur.search.problem import Problem

POLICY, WEIGHTS, ONNX, PT2, README = "policy.json", "model.safetensors", "model.onnx", "model.pt2", "README.md"
CODES, SCALE, LEVELS = ".weight.codes", ".weight.scale", ".weight.levels"
SAME_TOP1 = 0.005
"""Scores that differ by more than this come from another network; the number of threads can move a last bit."""

RANGE_IMAGES = 64
"""Calibration images that give the ranges of sums and outputs in the ONNX file."""


# -------------------------------------------------------------------------------------------------------------- writing


def write_export(
    folder: str | Path,
    problem: Problem,
    policy: CompressionPolicy,
    budget: Budget,
    validation: Evaluation,
    test: Evaluation | None = None,
    pt2: bool = False,
) -> nn.Module:
    """Write a policy's network to a new folder, read it back, and return what was read.

    Args:
        folder: must not exist, or be empty. Nothing is left in it if anything fails.
        problem: the search that the policy belongs to.
        policy: what to build.
        budget: whose limits it meets.
        validation, test: its scores; they go into policy.json.
        pt2: whether to write model.pt2 too.
    Raises:
        InputError: if the folder is not free or cannot be written, or the network cannot be exported to ONNX.
        RuntimeError: if the model that is read back computes anything else.
    """
    folder = Path(folder)
    check_free(folder)
    network = problem.finalist_assembler.assemble(policy)
    draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        save_file(_packed_tensors(network), draft / WEIGHTS)
        graph, shape = problem.assembler.graph, problem.config.model.input
        ranges = problem.assembler.images  # None only where no layer reads integers, so that nothing has to be measured
        ranges = torch.zeros(1, *shape) if ranges is None else ranges[:RANGE_IMAGES]
        executions = export_onnx(network, graph, shape, ranges, draft / ONNX)
        if pt2:
            _write_pt2(network, shape, draft / PT2)
        document = _document(problem, policy, network, budget, validation, test, executions)
        document["weights_sha256"] = _checksum(draft / WEIGHTS)
        document["files"] = {path.name: _checksum(path) for path in sorted(draft.glob("model.*"))}
        document["policy_sha256"] = policy_checksum(document)
        (draft / POLICY).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (draft / README).write_text(_readme(document, folder.name), encoding="utf-8")
        # The user's own configuration named the factory: here it needs no check.
        loaded = load_compressed(draft, lambda **arguments: build_model(problem.config.model.factory, arguments))
        images = problem.data.tensors(problem.data.validation)[0][:16]
        with torch.inference_mode():
            if not torch.equal(loaded(images), network(images)):
                raise RuntimeError("The exported model computes something else than the one that was searched.")
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft)
        raise
    return loaded


def export_point(
    folder: str | Path,
    problem: Problem,
    document: Mapping[str, Any],
    budget: str,
    point: Mapping[str, Any] | None = None,
    pt2: bool = False,
) -> tuple[Evaluation, Evaluation]:
    """Write the export of a policy of a run; return its validation and its test score.

    Args:
        folder: must not exist, or be empty.
        problem: the search, built again from the run's configuration.
        document: the run's front.json.
        budget: name of the budget that the export is for.
        point: which policy, as front.json lists them; default: the budget's winner.
        pt2: see `write_export`.
    Raises:
        InputError: if nothing fits the budget, the folder is not free, or model, data or code are no longer what the
            run was made with.
    """
    point = winner(document, budget) if point is None else point
    policy = document_to_policy(point["policy"])
    costs = problem.space.costs.of_policy(policy)
    if not _same_costs(costs, point["costs"]):
        raise InputError(
            f"The run was made with another model: its policy cost {point['costs']}, now it costs {costs}. "
            "Restore the model's code and weights, or search again."
        )
    _check_same("validation top-1 of the dense model", document["dense"]["top1"], problem.dense.top1)
    validation, test = finalist_scores(problem, policy)
    for tested in document["final"]["points"]:
        if tested["evaluation"] == point["evaluation"]:
            _check_same("test top-1 of the exported policy", tested["top1"], test.top1)
    limits = next(entry for entry in problem.budgets if entry.name == budget)
    write_export(folder, problem, policy, limits, validation, test, pt2)
    return validation, test


def is_export_of(folder: str | Path, point: Mapping[str, Any], budget: str, pt2: bool = False) -> bool:
    """Whether a folder holds the whole export of this policy for this budget, unchanged; `point` as in `export_point`."""
    folder = Path(folder)
    if not (folder / POLICY).is_file():
        return False
    try:
        document = read_export(folder)
        check_files(folder, document)
        chosen = document["policy"] == json.loads(json.dumps(point["policy"])) and document["budget"]["name"] == budget
        return chosen and (PT2 in document["files"] or not pt2)
    except (InputError, KeyError, TypeError):
        return False


def _same_costs(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    # Not exactly equal: another processor may add a latency's terms in another order.
    return set(one) == set(other) and all(math.isclose(value, other[cost], rel_tol=1e-9) for cost, value in one.items())


def _check_same(score: str, recorded: float, found: float) -> None:
    # Not exactly equal: the number of threads changes the order of float sums, and with it now and then an answer.
    if abs(found - recorded) > SAME_TOP1:
        raise InputError(
            f"The {score} was {100 * recorded:.2f} % in the run and is {100 * found:.2f} % now: weights, data or code "
            "have changed. Restore the weights, data and versions of the run, or search again."
        )


def check_free(folder: Path) -> None:
    """Raise InputError unless an export can be written to `folder`; leaves nothing behind."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"The export folder {folder} exists already. Remove it, or choose another with --output.")
        parent = next(parent for parent in folder.absolute().parents if parent.exists())
        with TemporaryDirectory(dir=parent):  # only trying tells: permissions, read-only disks, files in the way
            pass
    except OSError as error:
        raise InputError(
            f"The export folder {folder} cannot be written: {error.strerror}. Choose another with --output."
        ) from None


def _packed_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to store; tied parameters once."""
    tensors = {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    for name, module in network.named_modules():
        if (quantized := quantized_weight(module)) is not None:
            del tensors[f"{name}.weight"]
            tensors[name + CODES] = torch.from_numpy(pack_bits(quantized.codes.numpy(), quantized.bits))
            tensors[name + SCALE] = quantized.scale
            if quantized.levels is not None:
                tensors[name + LEVELS] = quantized.levels
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors wants them apart


def _document(
    problem: Problem,
    policy: CompressionPolicy,
    network: nn.Module,
    budget: Budget,
    validation: Evaluation,
    test: Evaluation | None,
    executions: list[LayerExecution],
) -> dict[str, Any]:
    model, data, graph = problem.config.model, problem.data, problem.assembler.graph
    kept = problem.assembler.kept(policy)
    return {
        "schema": 1,
        "model": {"factory": model.factory, "args": model.args, "input": list(model.input)},
        "normalization": {
            "formula": "(pixel / 255 - mean) / std",
            "mean": [float(value) for value in data.mean],
            "std": [float(value) for value in data.std],
        },
        "classes": list(data.classes),
        "policy": policy_to_document(policy),
        "budget": {"name": budget.name, "limits": dict(budget.limits), "top1_drop": budget.top1_drop},
        "costs": dict(validation.costs),
        "dense_costs": dict(problem.dense.costs),
        "scores": {
            "validation": {"top1": validation.top1, "images": validation.images},
            "test": None if test is None else {"top1": test.top1, "images": test.images},
            "dense_validation": {"top1": problem.dense.top1, "images": problem.dense.images},
        },
        "data": data.source,
        "data_config": problem.config.data.model_dump(mode="json"),
        "device": None if problem.device is None else problem.device.document(),
        "groups": [
            {
                "name": group.name,
                "units": group.units,
                "prune_ratio": 1 - len(units) / group.units,
                "kept": units.tolist(),
            }
            for group, units in zip(graph.groups, kept, strict=True)
        ],
        "layers": _layers(network),
        "execution": [asdict(execution) for execution in executions],
        "note": "In model.safetensors weights are stored in their bits. In PyTorch activation bits are simulated: values are "
        "rounded to the grid, the arithmetic is float32. In model.onnx layers of at most 8 bits compute in integers.",
    }


def _layers(network: nn.Module) -> list[dict[str, Any]]:
    """Return the quantized layers: bits, shape of the weight, grid of the input."""
    layers = []
    for name, module in network.named_modules():
        weight, grid = quantized_weight(module), activation_grid(module)
        if weight is not None or grid is not None:
            layers.append(
                {
                    "name": name,
                    "weight_bits": FLOAT_BITS if weight is None else weight.bits,
                    "weight_shape": list(module.weight.shape),
                    "activation_bits": FLOAT_BITS if grid is None else grid.bits,
                    "activation_grid": None if grid is None else asdict(grid),
                }
            )
    return layers


def _readme(document: Mapping[str, Any], name: str) -> str:
    scores = [(split, score) for split, score in document["scores"].items() if score is not None]
    lines = "\n".join(f"- {split} top-1: {100 * score['top1']:.2f} % of {score['images']} images" for split, score in scores)
    costs = "\n".join(
        f"- {cost}: {_number(value)} ({100 * value / document['dense_costs'][cost]:.1f} % of dense)"
        for cost, value in document["costs"].items()
    )
    mean, std = ([round(value, 6) for value in document["normalization"][key]] for key in ("mean", "std"))
    shape = ", ".join(map(str, document["model"]["input"]))
    factory = document["model"]["factory"]
    imported, override = "", ""
    if not is_model_factory(find_factory(factory)[0]):
        module, _, function = factory.partition(":")
        imported, override = f"\nfrom {module} import {function}", f", factory={function}"
    return f"""# {factory}, compressed for the budget "{document["budget"]["name"]}"

In PyTorch:

```python
import torch
from secateur import load_compressed  # of the package secateur{imported}

model = load_compressed("{name}"{override})  # this folder; a torch.nn.Module in eval mode
mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in ({mean}, {std}))
logits = model((pixels.float() / 255 - mean) / std)  # pixels: (N, {shape}) uint8
```

In ONNX Runtime, {_executed(document)}:

```python
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{name}/{ONNX}", providers=["CPUExecutionProvider"])
mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in ({mean}, {std}))
(logits,) = session.run(None, {{"input": (pixels.astype(np.float32) / 255 - mean) / std}})  # pixels: (N, {shape}) uint8
```
{_pt2_readme(document, name, mean, std, shape)}
{costs}
{lines}

Loading in PyTorch imports the module of `{factory}` and calls it: its code runs. Load exports of people you trust only.

{document["note"]}{_execution_notes(document)}
"""


def _number(value: float) -> str:
    """Return counts to the last unit, milliseconds and their like with four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _executed(document: Mapping[str, Any]) -> str:
    layers = document["execution"]
    integer = sum(layer["executed"] == "int8" for layer in layers)
    others = ", the others in float32" if integer < len(layers) else ""
    return f"{integer} of {len(layers)} layers in 8-bit integers{others}"


def _execution_notes(document: Mapping[str, Any]) -> str:
    """Return what is to be said about how model.onnx executes the layers, each sentence once, with its layers."""
    said: dict[str, list[str]] = {}
    for layer in document["execution"]:
        if layer["note"]:
            said.setdefault(layer["note"], []).append(layer["name"])
    lines = "".join(f"\n- {', '.join(f'`{name}`' for name in names)}: {note}" for note, names in said.items())
    return f"\n\nHow `{ONNX}` executes these layers:\n{lines}" if lines else ""


def _pt2_readme(document: Mapping[str, Any], name: str, mean: list[float], std: list[float], shape: str) -> str:
    if PT2 not in document["files"]:
        return ""
    return f"""
With torch alone, quantization simulated:

```python
import torch

model = torch.export.load("{name}/{PT2}").module()
mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in ({mean}, {std}))
logits = model((pixels.float() / 255 - mean) / std)  # pixels: (N, {shape}) uint8
```
"""


def _write_pt2(network: nn.Module, image_shape: Sequence[int], path: Path) -> None:
    """Write the network as torch.export has it, without the stack traces, which name files of this machine."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.inference_mode():  # so quantizers use operators that torch.export knows
        warnings.simplefilter("ignore")  # torch's own about its parts
        try:
            program = torch.export.export(network, (torch.zeros(2, *image_shape),), dynamic_shapes=({0: batch},))
        except Exception as error:  # it runs the user's forward
            reason = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"torch.export cannot export this network: {type(error).__name__}: {reason} Leave out --pt2."
            ) from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)


# -------------------------------------------------------------------------------------------------------------- loading


def read_export(folder: str | Path) -> dict[str, Any]:
    """Return the content of an export's policy.json.

    Raises:
        InputError: if the folder is no export, or the file is damaged.
    """
    return read_json(Path(folder) / POLICY, "an export")


def check_files(folder: Path, document: Mapping[str, Any]) -> None:
    """Raise InputError unless all files of an export are those that were written."""
    if document.get("policy_sha256") != policy_checksum(document):
        raise InputError(f"{folder / POLICY} is not the file that was exported: it was changed. Export it again.")
    for name, checksum in document["files"].items():
        _check_file(folder / name, checksum)


def policy_checksum(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what policy.json says, leaving out this very entry."""
    text = json.dumps({key: value for key, value in document.items() if key != "policy_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load_compressed(folder: str | Path, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Return the compressed model in an export folder, eval mode; its weights are those that were scored, bit for bit.

    Loading imports the module of the factory that policy.json names, which runs that module's code, and calls the
    factory if it looks like one of networks. With `factory` neither happens.

    Args:
        folder: of the export.
        factory: called in place of the one that policy.json names, with the same arguments.
    Raises:
        InputError: if the folder is no export, its files are damaged or were changed, the model's code has changed, or
            what policy.json names is no factory of networks.
    """
    folder = Path(folder)
    document = read_export(folder)
    try:
        packed = _read_weights(folder / WEIGHTS, document["weights_sha256"])
        model = build_dense(document["model"], factory).float().eval()
        _restore(model, packed, document["layers"])
        with torch.inference_mode():
            model(torch.zeros(1, *document["model"]["input"]))
    except InputError:
        raise
    except Exception as error:  # a hand-edited file can break any step above in its own way
        raise InputError(f"{folder / POLICY} does not fit the model: {type(error).__name__}: {error}") from error
    return model


def build_dense(model: Mapping[str, Any], factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Return the network before compression; calls nothing that policy.json names unless it makes networks."""
    if factory is not None:
        return call_factory(factory, model["args"], model["factory"])
    function, arguments = find_factory(model["factory"], model["args"])
    if not is_model_factory(function):
        raise InputError(
            f"{POLICY} names `{model['factory']}`, which is no torch.nn.Module class and no function of a module with "
            "one, so it was not called. If it makes the network, pass it: load_compressed(folder, factory=...)."
        )
    return call_factory(function, arguments, model["factory"])


def _check_file(path: Path, checksum: str) -> None:
    if not path.is_file():
        raise InputError(f"{path.parent} is not an export: it has no {path.name}.")
    if _checksum(path) != checksum:
        raise InputError(f"{path} is not the file that was exported: it is truncated or was changed. Export it again.")


def _read_weights(path: Path, checksum: str) -> dict[str, Tensor]:
    _check_file(path, checksum)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _restore(model: nn.Module, packed: Mapping[str, Tensor], layers: list[dict[str, Any]]) -> None:
    """Give a freshly built dense model the stored tensors, their shapes and the quantizers, in place."""
    tensors = {name: tensor for name, tensor in packed.items() if not name.endswith((CODES, SCALE, LEVELS))}
    quantized = {}
    for layer in layers:
        if layer["weight_bits"] != FLOAT_BITS:
            name, shape = layer["name"], tuple(layer["weight_shape"])
            stream = packed[name + CODES].numpy().astype(np.uint8, copy=False)
            codes = torch.from_numpy(unpack_bits(stream, layer["weight_bits"], shape))
            quantized[name] = QuantizedWeight(codes, packed[name + SCALE], layer["weight_bits"], packed.get(name + LEVELS))
            tensors[f"{name}.weight"] = quantized[name].dequantize()
    expected = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if missing := sorted(expected - set(tensors)):
        raise InputError(f"The export has no tensor `{missing[0]}`, which the factory makes: the model's code has changed.")
    resize_model(model, tensors)
    for layer in layers:
        module = model.get_submodule(layer["name"])
        if layer["name"] in quantized:
            set_quantized_weight(module, quantized[layer["name"]])
        if layer["activation_bits"] != FLOAT_BITS:
            set_activation_grid(module, ActivationGrid(**layer["activation_grid"]))


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
