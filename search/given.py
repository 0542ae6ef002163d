"""A model and a task as Python objects, in place of the sections `model` and `data` of a configuration."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost_models.core import InputError
from secateur.envs.inputs import Inputs, tensors_of_inputs
from secateur.envs.metric import Metric
from secateur.envs.model_graph.plain_layers import make_weights_plain, unwrapped
from secateur.envs.tasks.core import Batch, first_outputs
from secateur.envs.tasks.functions import (
    Evaluate,
    FunctionTask,
    check_divergence,
    check_functions,
    divergence_task,
    example_inputs,
    output_divergence,
    read_loader,
)
from secateur.envs.tasks.imports import OBJECT
from secateur.envs.tasks.models import check_weights
from secateur.envs.tasks.named_functions import FunctionsConfig, find_functions

SAMPLES = 512
"""Calibration samples that are read from the loader."""

SHORTCUTS = ("agent", "options", "evaluations", "seed", "workers", "time_limit")
"""Keyword arguments that belong to the section `search` of a configuration."""


@dataclass(frozen=True, eq=False)
class Given:
    """What the user passed to `secateur.search`.

    Attributes:
        model: the dense model, in eval mode; a copy, so that the user's stays as it is.
        example: one sample of its inputs.
        task: scores it.
    """

    model: nn.Module
    example: Inputs
    task: FunctionTask

    def factory(self, **arguments: Any) -> nn.Module:
        """Return a copy of the dense model: what a factory by name would build."""
        return copy.deepcopy(self.model)


def make_given(
    model: nn.Module,
    inputs: Any,
    calibration: Iterable[Any],
    evaluate: Evaluate | None = None,
    test: Evaluate | None = None,
    metric: Metric | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    divergence: Callable[[Any, Any], Tensor] | None = None,
    samples: int = SAMPLES,
    check: bool = True,
) -> Given:
    """Return the objects, checked on the dense model; arguments as in `secateur.search`.

    Args:
        samples: calibration samples that are read.
        check: whether the functions are tried on the dense model.
    Raises:
        InputError: if something among them cannot be used.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "`config` must be a configuration, the path of a YAML file, its content as a dict, or a torch.nn.Module, but is "
            f"{type(model).__name__}."
        )
    if inputs is None or calibration is None:
        raise InputError("A search of a model object needs `inputs`, example inputs, and `calibration`, a loader of inputs.")
    if evaluate is None and (test is not None or metric is not None):
        raise InputError("`test` and `metric` need `evaluate`: without it, the divergence from the dense model is the score.")
    if evaluate is not None and metric is None:
        raise InputError('`evaluate` needs `metric`, for example secateur.Metric("miou", higher_is_better=True).')
    dense = copy.deepcopy(unwrapped(model)).cpu().float().eval()
    check_weights(dense, f"The model, {type(model).__name__},")
    make_weights_plain(dense)
    example, compare = example_inputs(dense, inputs), divergence or output_divergence
    outputs = first_outputs(dense, example, "Check `inputs`.")
    if divergence is not None:
        check_divergence(divergence, outputs)
    batches = read_loader(calibration, example, samples, list(inspect.signature(dense.forward).parameters))
    if evaluate is None:
        return Given(dense, example, divergence_task(dense, batches, compare, loss))
    assert metric is not None
    task = FunctionTask(metric, batches, evaluate, test, loss, compare)
    if check:
        check_functions(task, dense)
    return Given(dense, example, task)


def named_given(model: nn.Module, named: FunctionsConfig, shape: Sequence[int], check: bool = True) -> Given:
    """Return the objects that a configuration names.

    Args:
        model: the dense model.
        named: the functions.
        shape: `model.input`.
        check: whether the functions are tried on the dense model.
    Raises:
        InputError: if something among them cannot be used.
    """
    found = find_functions(named)
    if found["inputs"] is None:
        found["inputs"] = torch.zeros(1, *shape)
    given = make_given(model, **found, samples=named.samples, check=check)
    first = tuple(tensors_of_inputs(given.example)[0].shape[1:])
    if first != tuple(shape):
        raise InputError(f"`model.input` is {list(shape)}, but the first tensor of `task.inputs` has the shape {list(first)}.")
    return given


def given_config(given: Given, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a search of these objects.

    Args:
        given: the objects.
        settings: sections of a configuration, such as `budgets` and `space`, the `SHORTCUTS`, and `part` of the section `model`.
    """
    values = {name: value for name, value in settings.items() if name not in (*SHORTCUTS, "part")}
    values["search"] = {**values.get("search", {}), **{name: settings[name] for name in SHORTCUTS if name in settings}}
    shape = list(tensors_of_inputs(given.example)[0].shape[1:])
    kind = type(given.model)
    values["model"] = {"factory": f"{OBJECT}{kind.__module__}.{kind.__qualname__}", "input": shape, "part": settings.get("part")}
    values["data"] = {"name": f"{OBJECT}loader", "calibration": given.task.samples("calibration"), "validation": 1}
    return values
