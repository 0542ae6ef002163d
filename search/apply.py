"""`secateur apply`: a policy that was found for some weights, on other weights of the same architecture.

    policy of an export + new weights ─▶ channels ─▶ careful repair ─▶ training, if asked for ─▶ export, verified

The other weights may come from a longer training, from fine-tuning on other data, or from another random seed. No search is
needed: the configuration is in the export's policy.json.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from secateur.cost_models.core import LayerShape
from secateur.envs.assembler import Assembler
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.metric import Metric
from secateur.envs.policy_space import document_to_policy
from secateur.envs.tasks.weights import load_weights
from secateur.envs.training.distillation import EpochRecord, Training, Watch
from secateur.search.build import build_problem
from secateur.search.config import Overrides, SearchConfig, apply_overrides, parse_config
from secateur.search.export.files import POLICY, check_files, read_export
from secateur.search.export.verification import Verification
from secateur.search.export.write import BuiltNetwork, architecture, check_free, write_export
from secateur.search.given import Given
from secateur.search.named_code import check_named_code
from secateur.search.problem import Problem, StatusCallback
from secateur.search.results.finalize import score_network
from secateur.search.results.winners import check_export
from secateur.search.training.finalize import training_config
from secateur.search.training.reports import batch_reporter
from secateur.search.training.samples import training_samples

Channels = Literal["rank", "keep"]
"""Which channels are kept: those with the largest importance in the new weights, or those of the export."""


@dataclass(frozen=True)
class Applied:
    """A policy on other weights.

    Attributes:
        folder: of the new export.
        budget: name of the budget that the policy was found for.
        metric: of the scores.
        dense: validation score of the dense network with the new weights.
        repaired: validation score after the repair.
        validation, test: scores of the exported network, after the training if there was one.
        verification: what verification found.
    """

    folder: Path
    budget: str
    metric: Metric
    dense: float
    repaired: float
    validation: float
    test: float
    verification: Verification


def apply(
    policy: str | os.PathLike[str],
    weights: str | os.PathLike[str] | nn.Module,
    *,
    channels: Channels = "rank",
    epochs: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    status: StatusCallback = lambda text: None,
    note: StatusCallback = lambda text: None,
    given: Given | None = None,
    trust: Collection[str] = (),
) -> Applied:
    """Put the policy of an export on other weights of the same architecture; repair, export and verify the network.

    Args:
        policy: an export folder, or its policy.json.
        weights: file with the other weights, as `model.weights`; with `given`, also a model with them.
        channels: "rank": channels are ranked again, by the importance of the search, in the new weights; "keep": those of the
            export are kept, which suits weights that are close to the earlier ones.
        epochs: epochs of training with distillation from the new dense model, with the options `finalize.training`; None: no
            training. An interrupted training continues when the same call is made again.
        output: folder to write; default: the export's, with "-applied" behind its name.
        overrides: changes of the configuration, such as {"data.root": "where/the/data/are/now"}.
        status: called with a few words at each stage.
        note: called with sentences that are worth keeping.
        given: model and task as Python objects, if the search began with such (`Run.given`).
        trust: modules that policy.json may name.
    Returns:
        The export and its scores.
    Raises:
        InputError: if the export is damaged, the architecture is another one (the error names the first layer that differs), the
            weights cannot be read, or the folder is not free.
    """
    source = Path(policy).parent if Path(policy).name == POLICY else Path(policy)
    if channels not in ("rank", "keep"):
        raise InputError(f"`channels` must be rank or keep, but got {channels!r}.")
    document = read_export(source)
    check_files(source, document)
    folder = source.with_name(f"{source.name}-applied") if output is None else Path(output)
    check_free(folder)
    config = _config(source, document, overrides, weights, given, trust)
    recipe = None if epochs is None else training_config(config, epochs)
    problem = build_problem(config, status, None if given is None else with_weights(given, weights, status))
    check_architecture(document, problem.assembler.graph.geometry.layers)
    if channels == "keep":
        problem = keeping(problem, [np.array(group["kept"]) for group in document["groups"]])
    chosen = document_to_policy(document["policy"])
    status("repairing the network")
    network = problem.finalist_assembler.assemble(chosen)
    repaired = problem.task.evaluate(network, "validation").score
    training = None
    if recipe is not None:
        samples, text = training_samples(problem, recipe)
        note(text)
        checkpoint = folder.with_name(f".{folder.name}.training.safetensors")
        identity = {"policy": document["policy"], "samples": text, "channels": channels, "start": repaired}
        found = Training(problem.task, problem.assembler.model, samples, recipe, checkpoint, identity).run(
            network, _watch(status, note, problem)
        )
        if found.note:
            note(found.note)
        network, training = found.network, {"recipe": asdict(recipe), "epochs": len(found.epochs), "samples": text}
    validation, test = (_score(problem, chosen, network, split) for split in ("validation", "test"))
    status("exporting and checking the network")
    write_export(folder, problem, chosen, _budget(document), validation, test, built=BuiltNetwork(network, training))
    if recipe is not None:
        checkpoint.unlink(missing_ok=True)
    verification = check_export(problem, folder)
    return Applied(
        folder,
        document["budget"]["name"],
        problem.task.metric,
        problem.dense.score,
        repaired,
        validation.score,
        test.score,
        verification,
    )


def _config(
    source: Path,
    document: Mapping[str, Any],
    overrides: Overrides,
    weights: str | os.PathLike[str] | nn.Module,
    given: Given | None,
    trust: Collection[str],
) -> SearchConfig:
    """Return the configuration of the search that found the policy, with the new weights."""
    path = source / POLICY
    if "config" not in document:
        raise InputError(f"{path} has no `config`, because an earlier version wrote it. Export the policy again.")
    values = copy.deepcopy(document["config"])
    named = apply_overrides(values, overrides)
    if given is None:
        if isinstance(weights, nn.Module):
            raise InputError(
                f"{path} names the factory `{values['model']['factory']}`, so `weights` must be a file: save the model's state "
                "dict with torch.save."
            )
        values["model"]["weights"] = str(Path(weights).expanduser())
    config = parse_config(values, str(path), named)
    if given is None:
        check_named_code(config, overrides, POLICY, trust)
    return config


def with_weights(given: Given, weights: str | os.PathLike[str] | nn.Module, status: StatusCallback = lambda text: None) -> Given:
    """Return a copy of the given objects whose model has other weights.

    Raises:
        InputError: if the weights are those of another model.
    """
    model = copy.deepcopy(given.model)
    if not isinstance(weights, nn.Module):
        load_weights(model, Path(weights), status)
        return replace(given, model=model, task=given.task.with_dense(model))
    try:
        model.load_state_dict(weights.state_dict())
    except RuntimeError as error:
        raise InputError(f"`weights` is not a model of the same architecture: {str(error).splitlines()[1].strip()}") from None
    return replace(given, model=model, task=given.task.with_dense(model))


def check_architecture(document: Mapping[str, Any], layers: tuple[LayerShape, ...]) -> None:
    """Raise InputError, which names the first layer that differs, unless a network has the layers of an exported one.

    Args:
        document: content of policy.json.
        layers: of the dense network with the new weights.
    """
    recorded = [f"`{name}` {shape}" for name, shape in document["architecture"].items()]
    found = [f"`{name}` {shape}" for name, shape in architecture(layers).items()]
    for one, other in zip_longest(recorded, found, fillvalue="none"):
        if one != other:
            raise InputError(
                f"The policy is for another architecture: the first layer that differs is {one} in the export and {other} in "
                "this network. Search with this network instead."
            )


def keeping(problem: Problem, kept: list[np.ndarray]) -> Problem:
    """Return the problem with an importance that keeps exactly these units of each group, where the policy has their number."""

    def changed(assembler: Assembler) -> Assembler:
        scores = [np.isin(np.arange(len(own)), units).astype(float) for own, units in zip(assembler.scores, kept, strict=True)]
        return replace(assembler, scores=tuple(scores))

    return replace(problem, assembler=changed(problem.assembler), finalist_assembler=changed(problem.finalist_assembler))


def _budget(document: Mapping[str, Any]) -> Budget:
    own = document["budget"]
    return Budget(own["name"], own["limits"], own["metric_drop"])


def _score(problem: Problem, policy: CompressionPolicy, network: nn.Module, split: str) -> Evaluation:
    return score_network(problem, network, problem.space.costs.of_policy(policy), split)


def _watch(status: StatusCallback, note: StatusCallback, problem: Problem) -> Watch:
    metric = problem.task.metric

    def epoch(record: EpochRecord) -> None:
        score = "" if record.score is None else f", validation {metric.label} {metric.text(record.score)}"
        note(f"epoch {record.epoch}: loss {record.loss:.3f}{score}")

    return Watch(batch_reporter(status, "the network"), epoch, lambda network: problem.task.evaluate(network, "validation").score)
