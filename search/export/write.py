"""Writes a compressed model to a folder: JSON, safetensors and ONNX, no pickles.

policy.json         the policy, the kept channels, scores, costs and limits: everything but the numbers of the network
model.safetensors   its tensors; the weights of quantized layers as packed integer codes and one scale per channel
model.onnx          the same network for runtimes; `execution` in policy.json says which layers are in 8-bit integers
model.pt2           if asked for: the network with simulated quantization as torch.export has it; needs no code of the model
README.md           how to load it
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os.path import exists, isdir, isfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.cost_models.core import FLOAT_BITS, LayerShape
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.devices import CPU, move_network
from secateur.envs.inputs import Inputs, call_model, describe_inputs, positional, samples_like, signature_of
from secateur.envs.model_graph.trace import root_cause
from secateur.envs.parts import part_names, parts_of, whole_with
from secateur.envs.policy_space import document_to_policy, policy_to_document
from secateur.envs.pruning.slicing import written_sizes
from secateur.envs.pruning.view_sizes import view_sizes
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight
from secateur.envs.quantization.packing import pack_bits
from secateur.envs.tasks.core import first_inputs, tensors_of
from secateur.envs.tasks.named_functions import FUNCTIONS
from secateur.envs.tasks.supervised import SupervisedTask
from secateur.search.export.execution import layers_in_float
from secateur.search.export.files import (
    CODES,
    LEVELS,
    ONNX,
    POLICY,
    PT2,
    README,
    SCALE,
    WEIGHTS,
    check_files,
    file_checksum,
    policy_checksum,
    read_export,
)
from secateur.search.export.image_size import free_axes, free_batch, free_size, tensor_shapes
from secateur.search.export.load import load_compressed
from secateur.search.export.onnx_export import LayerExecution, export_onnx
from secateur.search.export.readme import export_readme
from secateur.search.jsonl import as_read
from secateur.search.results.document import winner
from secateur.search.results.finalize import finalist_scores
from secateur.search.schema import SCHEMA

if TYPE_CHECKING:
    from secateur.search.problem import Problem

SAME_QUALITY = 0.005
"""Scores of the same network differ by less than this: another number of threads changes the order of sums, and with it
the last bits and sometimes an answer."""

READ_BACK = 1e-5
"""Largest difference between the outputs of the model read back and those of the searched one, by the largest output."""

RANGE_IMAGES = 64
"""Calibration images that give the ranges of sums and outputs in the ONNX file."""


@dataclass(frozen=True)
class BuiltNetwork:
    """A policy's network that is assembled already, and perhaps trained.

    Attributes:
        network: in eval mode, quantized.
        training: how it was trained, as JSON values; goes into policy.json. None: not trained.
    """

    network: nn.Module
    training: Mapping[str, Any] | None = None


def write_export(
    folder: str | Path,
    problem: Problem,
    policy: CompressionPolicy,
    budget: Budget,
    validation: Evaluation,
    test: Evaluation | None = None,
    pt2: bool = False,
    built: BuiltNetwork | None = None,
) -> nn.Module:
    """Write a policy's network to a new folder, read it back, and return the network that was read.

    Args:
        folder: must not exist, or be empty. Nothing is left in it if anything fails.
        problem: the search that the policy belongs to.
        policy: the policy to build.
        budget: the budget whose limits the policy meets.
        validation, test: its scores; they go into policy.json.
        pt2: whether to write model.pt2 too.
        built: the policy's network; None: it is assembled with the finalists' recovery.
    Raises:
        InputError: if the folder is not free or cannot be written, or the network cannot be exported to ONNX.
        RuntimeError: if the model that is read back computes something else.
    """
    built = BuiltNetwork(problem.finalist_assembler.assemble(policy)) if built is None else built
    problem, network = problem.on(CPU), move_network(built.network, CPU)
    given = problem.given
    # The user's own configuration named the factory, so here it is called without a check.
    factory = problem.config.model.factory if given is None else given.model
    with draft_of(Path(folder)) as draft:
        executions = _write_models(draft, problem, policy, network, pt2)
        document = _document(problem, policy, network, budget, validation, test, executions)
        document["training"] = None if built.training is None else dict(built.training)
        write_document(draft, document, Path(folder).name)
        loaded = load_compressed(draft, factory)
        check_same_outputs(parts_of(problem.task, loaded), network, first_inputs(problem.task, "validation", 16)[0])
    return loaded


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """Give a folder to write an export to, which becomes `folder` at the end; nothing is left of it if anything fails.

    Raises:
        InputError: if `folder` is not free or cannot be written.
    """
    check_free(folder)
    draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft)
        raise


def write_document(draft: Path, document: dict[str, Any], name: str) -> None:
    """Write policy.json and README.md of an export whose models are written; adds the checksums to `document`.

    Args:
        draft: where the models are.
        document: content of policy.json.
        name: of the export folder.
    """
    document["onnx"] = tensor_shapes(draft / ONNX)
    document["weights_sha256"] = file_checksum(draft / WEIGHTS)
    document["files"] = {path.name: file_checksum(path) for path in sorted(draft.glob("model.*"))}
    document["policy_sha256"] = policy_checksum(document)
    (draft / POLICY).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (draft / README).write_text(export_readme(document, name), encoding="utf-8")


@torch.inference_mode()
def check_same_outputs(loaded: nn.Module, network: nn.Module, inputs: Inputs) -> None:
    """Raise RuntimeError if the network that was read back computes something else than the one that was written."""
    pairs = zip(tensors_of(call_model(loaded, inputs)), tensors_of(call_model(network, inputs)), strict=True)
    # Kernels may sum in another order if memory is aligned otherwise, so the last bits may differ.
    if not all(torch.allclose(found, wanted, 0, READ_BACK * float(wanted.abs().max())) for found, wanted in pairs):
        raise RuntimeError("The exported model computes something else than the one that was searched.")


def _write_models(
    draft: Path, problem: Problem, policy: CompressionPolicy, network: nn.Module, pt2: bool
) -> list[LayerExecution]:
    """Write model.safetensors, model.onnx and perhaps model.pt2; return how each layer of model.onnx is executed."""
    save_file(packed_tensors(whole_with(problem.task, network)), draft / WEIGHTS)
    graph, ranges = problem.assembler.graph, problem.assembler.images
    if ranges is None:  # no layer has activation bits, so no range is measured
        ranges = first_inputs(problem.task, "validation", 1)[0]
    ranges = ranges[:RANGE_IMAGES]
    in_float = layers_in_float(problem.device, graph.geometry.shapes(policy.widths, policy.weight_bits, policy.activation_bits))
    executions = export_onnx(network, graph, ranges, draft / ONNX, in_float)
    if pt2:
        _write_pt2(network, ranges, draft / PT2)
    return executions


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
        point: the policy, as front.json lists it; default: the winner of the budget.
        pt2: see `write_export`.
    Raises:
        InputError: if no policy fits the budget, the folder is not free, or model, data or code are not those of the run.
    """
    point = winner(document, budget) if point is None else point
    policy = document_to_policy(point["policy"])
    check_same_model(problem, document, point)
    validation, test = finalist_scores(problem, policy)
    for tested in document["final"]["points"]:
        if tested["evaluation"] == point["evaluation"]:
            _check_same(problem, "exported policy on the test split", tested["score"], test.score)
    limits = next(entry for entry in problem.budgets if entry.name == budget)
    write_export(folder, problem, policy, limits, validation, test, pt2)
    return validation, test


def check_same_model(problem: Problem, document: Mapping[str, Any], point: Mapping[str, Any]) -> None:
    """Raise InputError if a policy of a run has other costs now, or its dense model another score.

    Args:
        problem: the search, built again from the run's configuration.
        document: the run's front.json.
        point: the policy, as front.json lists it.
    """
    costs = problem.space.costs.of_policy(document_to_policy(point["policy"]))
    if not _same_costs(costs, point["costs"]):
        raise InputError(
            f"The run was made with another model: its policy cost {point['costs']}, now it costs {costs}. "
            "Restore the model's code and weights, or search again."
        )
    _check_same(problem, "dense model on the validation split", document["dense"]["score"], problem.dense.score)


def is_export_of(
    folder: str | Path, point: Mapping[str, Any], budget: str, pt2: bool = False, training: Mapping[str, Any] | None = None
) -> bool:
    """Whether a folder holds the complete, unchanged export of this policy for this budget, trained in this way.

    Args:
        folder: of the export.
        point, budget, pt2: as in `export_point`.
        training: as in `BuiltNetwork`; None: not trained.
    """
    folder = Path(folder)
    if not isfile(folder / POLICY):
        return False
    try:
        document = read_export(folder)
        check_files(folder, document)
        same = document["policy"] == json.loads(json.dumps(point["policy"])) and document["budget"]["name"] == budget
        same = same and document.get("training") == as_read(training)
        return same and (PT2 in document["files"] or not pt2)
    except (InputError, KeyError, TypeError):
        return False


def check_free(folder: Path) -> None:
    """Raise InputError unless an export can be written to `folder`; leaves nothing behind."""
    try:
        if folder.exists() and (not isdir(folder) or any(folder.iterdir())):
            taken = f"The export folder {folder} exists already. Remove it, or choose another with"
            raise InputError(f"{taken} `output`.", f"{taken} --output.")
        parent = next(parent for parent in folder.absolute().parents if exists(parent))
        # Only a trial finds all obstacles: permissions, read-only disks, files in the way.
        with TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        failed = f"The export folder {folder} cannot be written: {error.strerror}. Choose another with"
        raise InputError(f"{failed} `output`.", f"{failed} --output.") from None


def _same_costs(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    # Not exactly equal: another processor may add a latency's terms in another order.
    return set(one) == set(other) and all(math.isclose(value, other[cost], rel_tol=1e-9) for cost, value in one.items())


def _check_same(problem: Problem, what: str, recorded: float, found: float) -> None:
    metric, dense = problem.task.metric, problem.dense.score
    if abs(metric.quality(found, dense) - metric.quality(recorded, dense)) > SAME_QUALITY:
        raise InputError(
            f"The {metric.label} of the {what} was {metric.text(recorded)} in the run and is {metric.text(found)} now: weights, "
            "data or code have changed. Restore the weights, data and versions of the run, or search again."
        )


# ------------------------------------------------------------------------------------------------------------ contents


def packed_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to store, each with memory of its own; tied parameters once."""
    tensors = {name: tensor.detach() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    for name, module in network.named_modules():
        if (quantized := quantized_weight(module)) is not None:
            del tensors[f"{name}.weight"]
            tensors[name + CODES] = torch.from_numpy(pack_bits(quantized.codes.numpy(), quantized.bits))
            tensors[name + SCALE] = quantized.scale
            if quantized.levels is not None:
                tensors[name + LEVELS] = quantized.levels
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory


def architecture(layers: Sequence[LayerShape]) -> dict[str, list[Any]]:
    """Return {layer: [kind, input channels, output channels, kernel, stride, groups]} of a dense network, as JSON values."""
    return {
        layer.name: [layer.kind, layer.in_channels, layer.out_channels, [*layer.kernel], [*layer.stride], layer.conv_groups]
        for layer in layers
    }


def layer_entries(network: nn.Module) -> list[dict[str, Any]]:
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


def _document(
    problem: Problem,
    policy: CompressionPolicy,
    network: nn.Module,
    budget: Budget,
    validation: Evaluation,
    test: Evaluation | None,
    executions: list[LayerExecution],
) -> dict[str, Any]:
    model, graph = problem.config.model, problem.assembler.graph
    data = problem.task.data if isinstance(problem.task, SupervisedTask) else None  # parts get no pixels
    example = first_inputs(problem.task, "validation", 1)[0]
    kept = problem.assembler.kept(policy)
    return {
        "schema": SCHEMA,
        "task": problem.config.task.model_dump(mode="json"),
        "metric": asdict(problem.task.metric),
        "model": {
            "factory": model.factory,
            "args": model.args,
            "input": list(model.input),
            "inputs": describe_inputs(example),
            **({"call": signature.document()} if (signature := signature_of(example)) else {}),
            "part": part_names(problem.task),
            **({"weights": model.weights} if problem.config.task.name == FUNCTIONS else {}),  # they may score by divergence
        },
        "normalization": None
        if data is None
        else {
            "formula": "(pixel / 255 - mean) / std",
            "mean": [float(value) for value in data.mean],
            "std": [float(value) for value in data.std],
        },
        "classes": [] if data is None else list(data.classes),
        "policy": policy_to_document(policy),
        "budget": {
            "name": budget.name,
            "limits": dict(budget.limits),
            "metric_drop": budget.metric_drop,
            "shares": _shares_of_dense(problem, budget),
        },
        "costs": dict(validation.costs),
        "dense_costs": dict(problem.dense.costs),
        "scores": {
            "validation": {"score": validation.score, "images": validation.images},
            "test": None if test is None else {"score": test.score, "images": test.images},
            "dense_validation": {"score": problem.dense.score, "images": problem.dense.images},
        },
        "data": problem.task.source,
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
        "sizes": written_sizes(network, graph),
        "views": view_sizes(network),
        "layers": layer_entries(network),
        "execution": [asdict(execution) for execution in executions],
        "architecture": architecture(graph.geometry.layers),
        "config": problem.config.model_dump(mode="json"),
        "note": "In model.safetensors weights are stored in their bits. In PyTorch activation bits are simulated: values are "
        "rounded to the grid, the arithmetic is float32. In model.onnx layers of at most 8 bits compute in integers, except "
        "where `execution` in policy.json names another reason.",
    }


def _shares_of_dense(problem: Problem, budget: Budget) -> dict[str, float]:
    """Return {cost: share of the dense network's cost} of the limits that the configuration gives in percent."""
    config = problem.config.budgets.get(budget.name)
    limits = {} if config is None else config.limits
    return {cost: limit.value for cost, limit in limits.items() if limit.relative and cost in budget.limits}


def _program(network: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the network as torch.export has it, with free image sizes where they can be free."""
    if (free := free_size(network, example)) is not None:
        with contextlib.suppress(Exception):  # a size may become a constant when the network is traced
            return torch.export.export(network, example, dynamic_shapes=free_axes(network, example, free.multiple))
    return torch.export.export(network, example, dynamic_shapes=free_batch(network, example))


def _write_pt2(network: nn.Module, images: Inputs, path: Path) -> None:
    """Write the network as torch.export has it, without the stack traces, which name files of this machine."""
    with warnings.catch_warnings(), torch.inference_mode():  # so quantizers use operators that torch.export knows
        warnings.simplefilter("ignore")  # they concern torch's own parts
        try:
            program = _program(positional(network, images), samples_like(images, 2))
        except Exception as error:  # it runs the user's forward
            failed = f"torch.export cannot export this network: {root_cause(error)}. Leave out"
            raise InputError(f"{failed} `pt2`.", f"{failed} --pt2.") from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, path)
