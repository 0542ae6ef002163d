"""The interface of cost models, and their input: the shapes of a population of compressed networks.

All arrays are numpy arrays; one row is one policy. Cost models use no tensors and no torch modules, so the feasibility
projection, the solvers and the agents can compute the costs of thousands of policies per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

FLOAT_BITS = 32
"""The bit-width of a tensor that is not quantized."""

MEMORY_COSTS = ("weight_bytes", "peak_activation_bytes")
"""Costs that do not depend on the number of multiply-accumulates."""


class InputError(ValueError):
    """The caller's input cannot be used; the message names the place, the value and the way out.

    Args:
        message: for Python callers; names arguments and functions, e.g. "`evaluations` must be at least 1".
        command: the same for users of the command; names options and verbs. None: `message` suits both.

    Attributes:
        command: the wording for the command line.
    """

    def __init__(self, message: str, command: str | None = None):
        super().__init__(message)
        self.command = message if command is None else command


@dataclass(frozen=True)
class Range:
    """The allowed range of a number in a configuration; infinite numbers and NaN are never allowed.

    A field declares its range beside its type, `damping: Annotated[float, Range(above=0)] = 0.01`, and `check_fields` in
    `__post_init__` checks it. The range of a mapping or a sequence holds for each number in it; None is always allowed.

    Attributes:
        least, above: lower end, included or excluded; None: no lower end. At most one of the two is given.
        most, below: upper end, included or excluded; None: no upper end. At most one of the two is given.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low, high = (self.least if self.above is None else self.above), (self.most if self.below is None else self.below)
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"
        if low is not None:
            return f"at least {low:g}" if self.above is None else f"above {low:g}"
        if high is not None:
            return f"at most {high:g}" if self.below is None else f"below {high:g}"
        return "finite"


Count = Annotated[int, Range(least=1)]
"""The type of an integer field that must be at least 1."""

Positive = Annotated[float, Range(above=0)]
"""The type of a field that must be above 0."""

NonNegative = Annotated[float, Range(least=0)]
"""The type of a field that must be 0 or more."""


def check_fields(config: object, owner: str = "") -> None:
    """Check every field of a dataclass whose type declares a `Range` or is a `Literal`.

    Args:
        config: the dataclass.
        owner: what the fields belong to, for the message, e.g. "the quantizer `gptq`".
    Raises:
        InputError: if a value is not allowed; the message names the field, the owner, the rule and the value.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = " or ".join(f'"{choice}"' for choice in get_args(hint))
            raise InputError(f'{_place(name, owner)} must be {choices}, but got "{value}".')
        for allowed in getattr(hint, "__metadata__", ()):
            if isinstance(allowed, Range):
                _check_range(name, value, allowed, owner)


def _check_range(name: str, value: Any, allowed: Range, owner: str) -> None:
    if isinstance(value, Mapping):
        numbers: Iterable[tuple[str, Any]] = [(f"{name}.{key}", number) for key, number in value.items()]
    elif isinstance(value, list | tuple):
        numbers = [(name, number) for number in value]
    else:
        numbers = [] if value is None else [(name, value)]
    for field_name, number in numbers:
        if number not in allowed:
            finite = "" if math.isfinite(number) else "finite and "
            raise InputError(f"{_place(field_name, owner)} must be {finite}{allowed}, but got {number}.")


def _place(name: str, owner: str) -> str:
    return f"`{name}` of {owner}" if owner else f"`{name}`"


@dataclass(frozen=True)
class LayerShape:
    """One convolution or linear layer of the dense network.

    Attributes:
        name: module path, e.g. "layer1.0.conv1".
        kind: "conv" or "linear".
        in_channels, out_channels: dense channel (feature) counts.
        kernel: (height, width); (1, 1) for linear layers.
        stride: (height, width).
        out_hw: spatial size of one output; (tokens, 1) for a linear layer applied to tokens.
        conv_groups: the convolution's own groups.
        calls: number of calls of the layer in one forward pass.
        has_bias: whether it has a bias vector.
        quantizable: whether weight and activation bit-widths can be chosen for it.
        own_weight: whether the layer is a module whose `weight` no other module uses.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    out_hw: tuple[int, int] = (1, 1)
    conv_groups: int = 1
    calls: int = 1
    has_bias: bool = False
    quantizable: bool = True
    own_weight: bool = True

    @property
    def depthwise(self) -> bool:
        """Whether each input channel has its own convolution; removing a channel then removes a conv group."""
        return self.conv_groups > 1 and self.conv_groups == self.in_channels

    @property
    def macs_per_weight(self) -> int:
        """Multiply-accumulates per weight and image."""
        return self.out_hw[0] * self.out_hw[1] * self.calls


@dataclass(frozen=True)
class NetworkGeometry:
    """All shapes of the network as functions of the widths of the coupled groups; all functions are affine.

    With L layers, G groups, B buffers (activations that hold memory) and S execution steps:

    Attributes:
        layers: the dense layers, in execution order.
        group_names: (G,) names.
        group_units: (G,) number of prunable units per dense group, integer.
        in_fixed, in_per_unit: (L,), (G, L); in_channels = in_fixed + widths @ in_per_unit.
        out_fixed, out_per_unit: (L,), (G, L), likewise for out_channels.
        other_fixed, other_per_unit: scalar, (G,); parameters that are not weights or biases of a layer (norms, embeddings).
        fixed_macs, macs_per_unit: scalar, (G,); multiply-accumulates of everything that is not a layer (attention, recurrent
            networks, products with computed weights). `macs_per_unit` None: all zeros.
        buffer_fixed, buffer_per_unit: (B,), (G, B); elements of each buffer, per image.
        buffer_readers: (B,) tuples of layer indices. If only quantized layers read a buffer, it is stored with the largest of
            their activation bits; an empty tuple means that other operators read it too, and it is stored in float32.
        live: (S, B) bool; whether a buffer holds memory while a step runs (its inputs, its outputs, values for later steps).
        step_layer: (S,) index of the step's layer, -1 for other operators.
        uncounted: operators whose multiply-accumulates are not known, with their modules, e.g. "fft_fft2 in `mixer`".
    """

    layers: tuple[LayerShape, ...]
    group_names: tuple[str, ...]
    group_units: np.ndarray
    in_fixed: np.ndarray
    in_per_unit: np.ndarray
    out_fixed: np.ndarray
    out_per_unit: np.ndarray
    other_fixed: float
    other_per_unit: np.ndarray
    fixed_macs: float
    buffer_fixed: np.ndarray
    buffer_per_unit: np.ndarray
    buffer_readers: tuple[tuple[int, ...], ...]
    live: np.ndarray
    step_layer: np.ndarray
    uncounted: tuple[str, ...] = ()
    macs_per_unit: np.ndarray | None = None

    @cached_property
    def kernel_area(self) -> np.ndarray:
        """(L,) float."""
        return np.array([layer.kernel[0] * layer.kernel[1] for layer in self.layers], float)

    @cached_property
    def conv_groups(self) -> np.ndarray:
        """(L,) integer."""
        return np.array([layer.conv_groups for layer in self.layers], int)

    @cached_property
    def depthwise(self) -> np.ndarray:
        """(L,) bool."""
        return np.array([layer.depthwise for layer in self.layers], bool)

    @cached_property
    def macs_per_weight(self) -> np.ndarray:
        """(L,) float."""
        return np.array([layer.macs_per_weight for layer in self.layers], float)

    @cached_property
    def has_bias(self) -> np.ndarray:
        """(L,) float, 0 or 1."""
        return np.array([layer.has_bias for layer in self.layers], float)

    def shapes(
        self, widths: ArrayLike | None = None, weight_bits: ArrayLike | None = None, activation_bits: ArrayLike | None = None
    ) -> LayerShapes:
        """Return the shapes of a population.

        Args:
            widths: kept units per group, (population, G); default: one dense network.
            weight_bits, activation_bits: (population, L) in 1..32; default: 32 everywhere.
        Raises:
            ValueError: if the sizes are inconsistent.
        """
        kept = np.atleast_2d(self.group_units if widths is None else np.asarray(widths))
        full = (len(kept), len(self.layers))
        bits = [np.full(full, FLOAT_BITS) if b is None else np.atleast_2d(np.asarray(b)) for b in (weight_bits, activation_bits)]
        if kept.shape[1] != len(self.group_units) or any(b.shape != full for b in bits):
            raise ValueError(
                f"`widths` must be (population, {len(self.group_units)}) and bits (population, {len(self.layers)}), "
                f"but got {kept.shape}, {bits[0].shape} and {bits[1].shape}."
            )
        return LayerShapes(self, kept, *bits)


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of a population of compressed networks; every array has one row per policy."""

    geometry: NetworkGeometry
    widths: np.ndarray  # (population, G) kept units
    weight_bits: np.ndarray  # (population, L)
    activation_bits: np.ndarray  # (population, L)

    def __len__(self) -> int:
        return len(self.widths)

    @cached_property
    def in_channels(self) -> np.ndarray:
        """(population, L) float."""
        return self.geometry.in_fixed + self.widths @ self.geometry.in_per_unit

    @cached_property
    def out_channels(self) -> np.ndarray:
        """(population, L) float."""
        return self.geometry.out_fixed + self.widths @ self.geometry.out_per_unit

    @cached_property
    def weights(self) -> np.ndarray:
        """Elements of each layer's weight tensor, (population, L) float."""
        geometry = self.geometry
        # A depthwise convolution loses one conv group with each channel; other convolutions keep their number of groups.
        fan_in = np.where(geometry.depthwise, 1.0, self.in_channels / geometry.conv_groups)
        return fan_in * self.out_channels * geometry.kernel_area

    @cached_property
    def other_parameters(self) -> np.ndarray:
        """Parameters outside the layers' weights and biases, (population,) float."""
        return self.geometry.other_fixed + self.widths @ self.geometry.other_per_unit

    @cached_property
    def other_macs(self) -> np.ndarray:
        """Multiply-accumulates outside the layers, (population,) float."""
        fixed, per_unit = self.geometry.fixed_macs, self.geometry.macs_per_unit
        return fixed + (np.zeros(len(self)) if per_unit is None else self.widths @ per_unit)

    @cached_property
    def buffer_bytes(self) -> np.ndarray:
        """Bytes of every buffer for one image, (population, B) float."""
        elements = self.geometry.buffer_fixed + self.widths @ self.geometry.buffer_per_unit
        bits = np.full(elements.shape, float(FLOAT_BITS))
        readers = self.geometry.buffer_readers
        alone = [index for index, layers in enumerate(readers) if len(layers) == 1]
        bits[:, alone] = self.activation_bits[:, [readers[index][0] for index in alone]]
        for index, layers in enumerate(readers):
            if len(layers) > 1:
                bits[:, index] = self.activation_bits[:, list(layers)].max(axis=1)
        return elements * bits / 8


class CostModel(Protocol):
    """One cost of a network; smaller is better. Cost models are small frozen objects; the shapes are their only input."""

    @property
    def name(self) -> str:
        """The cost's name with its unit, e.g. "weight_bytes"."""
        ...

    def per_layer(self, shapes: LayerShapes) -> np.ndarray:
        """Return each layer's share, (population, L)."""
        ...

    def total(self, shapes: LayerShapes) -> np.ndarray:
        """Return the cost of each network, (population,); not always the sum over layers (peak memory)."""
        ...
