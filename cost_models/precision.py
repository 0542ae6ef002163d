"""The precision in which a device executes a layer: integers for the bit-widths of its integer kernels, otherwise floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.cost_models.core import FLOAT_BITS

FLOAT_WIDTHS: Mapping[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
"""Bits of one value for each float precision."""


def executed_precision(weight_bits: np.ndarray, activation_bits: np.ndarray, integer_bits: Sequence[int]) -> np.ndarray:
    """Return the bits in which each layer is executed; `FLOAT_BITS` means the device's float precision.

    Both operands of an integer kernel have the same bit-width: a layer is executed with the smallest of `integer_bits` that is
    enough for its weights and its activations. A layer with 4-bit weights and float activations is executed in floats.

    Args:
        weight_bits, activation_bits: arrays of equal shape, in 1..32.
        integer_bits: bit-widths of the device's integer kernels.
    """
    needed = np.maximum(weight_bits, activation_bits)
    executed = np.full(needed.shape, FLOAT_BITS)
    for bits in sorted(integer_bits, reverse=True):
        executed[needed <= bits] = bits
    return executed


def precision_name(bits: int, float_precision: str) -> str:
    """Return the name of a precision: "int8" for 8 bits, the float precision for `FLOAT_BITS`."""
    return float_precision if bits == FLOAT_BITS else f"int{bits}"
