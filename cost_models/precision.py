"""In which precision a device executes a layer: integer kernels exist for few bit-widths, everything else is floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.cost_models.core import FLOAT_BITS

FLOAT_WIDTHS: Mapping[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16}
"""Bits of one value, by float precision."""


def executed_precision(weight_bits: np.ndarray, activation_bits: np.ndarray, integer_bits: Sequence[int]) -> np.ndarray:
    """Return the bits that each layer is executed in; `FLOAT_BITS` stands for the device's float precision.

    Both operands of an integer kernel have the same width: a layer runs at the smallest of `integer_bits` that holds its
    weights and its activations. Weights of 4 bits at float activations are floating-point work.

    Args:
        weight_bits, activation_bits: arrays of one shape, in 1..32.
        integer_bits: widths that the device has integer kernels for.
    """
    needed = np.maximum(weight_bits, activation_bits)
    executed = np.full(needed.shape, FLOAT_BITS)
    for bits in sorted(integer_bits, reverse=True):
        executed[needed <= bits] = bits
    return executed


def precision_name(bits: int, float_precision: str) -> str:
    """Return the name of what `executed_precision` says: "int8", or the float precision."""
    return float_precision if bits == FLOAT_BITS else f"int{bits}"
