"""The values of a forward pass, numbered in the order in which torch's functions return them.

A pruned network runs the same code as the dense network, so a value has the same number in both: one run of the dense network
shows which values to use in every candidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.envs.inputs import Inputs, call_model, map_inputs

_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__)
_CLIPS = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), (0.0, float("inf"))),
    F.relu6: (0.0, 6.0),
}


@dataclass(frozen=True)
class Target:
    """The value at which the error of a layer is measured.

    Attributes:
        value: number of the layer's output (after its batch norm, if it has one), or of a sum with this output.
        other: number of the other operand if `value` is a sum; it is computed before the layer runs.
        clip: (lowest, highest) value after the only reader, a ReLU for example; None: the values are not clipped.
        sample: the value for the first image in the dense network.
    """

    value: int
    other: int | None
    clip: tuple[float, float] | None
    sample: Tensor


@dataclass(frozen=True)
class ForwardPlan:
    """The functions and targets of a forward pass, from one run of the dense network.

    Attributes:
        functions: functions that return tensors, in execution order.
        targets: targets by layer name, for the layers that run once.
    """

    functions: tuple[Callable, ...]
    targets: Mapping[str, Target]


class ValueObserver(TorchFunctionMode):
    """Passes the values of a forward pass to a function before they can be overwritten.

    Args:
        functions: functions of the plan. After the first different function, no values are passed and `agrees` is False.
        on_value: function of number and value.
    """

    def __init__(self, functions: tuple[Callable, ...], on_value: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.functions, self.on_value = functions, on_value
        self.ran = self.values = 0
        self.agrees, self.paused = True, False

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        values = [] if self.paused else _tensors(result)
        if values:
            self.agrees &= self.ran < len(self.functions) and function == self.functions[self.ran]
            self.ran += 1
        for value in values if self.agrees else ():
            self.on_value(self.values, value)
            self.values += 1
        return result


@contextmanager
def observing(mode: ValueObserver | _Recorder, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Observe a forward pass, except the pre-hooks of these modules, because quantized layers have an additional pre-hook."""
    hooks = []

    def pause(paused: bool) -> Callable:
        return lambda *_: setattr(mode, "paused", paused)

    for module in modules.values():
        hooks += [
            module.register_forward_pre_hook(pause(True), prepend=True),
            module.register_forward_pre_hook(pause(False)),
        ]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def plan_forward(
    model: nn.Module, layers: Mapping[str, str | None], hidden: Mapping[str, nn.Module], image: Inputs
) -> ForwardPlan:
    """Return the targets of the layers.

    Args:
        model: the dense network, in eval mode.
        layers: {layer: batch norm that is its only reader, or None}.
        hidden: modules whose pre-hooks are not observed.
        image: one sample as a batch.
    """
    modules = dict(model.named_modules())
    recorder = _Recorder()
    calls: Counter[str] = Counter()
    first_value: dict[str, int] = {}
    output: dict[str, int | None] = {}

    def enter(name: str) -> None:
        calls[name] += 1
        first_value[name] = len(recorder.copies)

    def leave(name: str, result: Tensor) -> None:
        output[name] = recorder.number(result)

    watched = {*layers, *filter(None, layers.values())}
    hooks = [modules[name].register_forward_pre_hook(lambda *_, name=name: enter(name)) for name in watched]
    hooks += [modules[name].register_forward_hook(lambda *args, name=name: leave(name, args[2])) for name in watched]
    image = map_inputs(Tensor.clone, image)  # tensors made in inference mode have no versions, their clones do
    try:
        with observing(recorder, hidden):
            call_model(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    targets = {}
    for name, norm in layers.items():
        end = output.get(norm or name)
        if calls[name] == 1 and calls[norm or name] == 1 and end is not None:
            targets[name] = recorder.target(end, before=first_value[name])
    return ForwardPlan(tuple(recorder.functions), targets)


class _Recorder(TorchFunctionMode):
    """Numbers all values, and records sums and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable] = []
        self.copies: list[Tensor] = []
        self.known: dict[int, tuple[int, int, Tensor]] = {}  # by id; the stored tensor keeps its id from being reused
        self.readers: Counter[int] = Counter()
        self.sums: dict[int, tuple[int, int]] = {}
        self.clips: dict[int, tuple[float, float]] = {}
        self.paused = False

    def number(self, tensor: Tensor) -> int | None:
        """Return a value's number; None if no function returned it, or if it was overwritten afterwards."""
        number, version, _ = self.known.get(id(tensor), (None, None, None))
        return number if number is not None and tensor._version == version else None

    def target(self, value: int, before: int) -> Target:
        """Return the target of a layer; `value` is its output, and `before` values were computed before it runs."""
        total, other = self.sums.get(value, (value, None))
        if other is None or other >= before or self.readers[value] > 1:
            total, other = value, None
        clip = self.clips.get(total) if self.readers[total] == 1 else None
        return Target(total, other, clip, self.copies[total])

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = [argument for argument in _tensors((args, kwargs)) if id(argument) in self.known]
        numbers = [self.number(argument) for argument in arguments]
        plain_sum = function in _ADDITIONS and not kwargs and len(arguments) == 2 and args[0].shape == args[1].shape
        result = function(*args, **(kwargs or {}))
        values = [] if self.paused else _tensors(result)
        if not values:
            return result
        self.functions.append(function)
        known = [number for number in numbers if number is not None]
        self.readers.update(set(known))
        if plain_sum and len(known) == 2:
            self.sums |= {known[0]: (len(self.copies), known[1]), known[1]: (len(self.copies), known[0])}
        if function in _CLIPS and len(numbers) == len(known) == 1:
            self.clips[known[0]] = _CLIPS[function]
        for value in values:
            self.known[id(value)] = len(self.copies), value._version, value
            self.copies.append(value.clone())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
