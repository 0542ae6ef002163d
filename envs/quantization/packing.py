"""Packing of b-bit codes: each code takes b bits."""

from __future__ import annotations

import numpy as np


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in row-major order as one bit stream: (ceil(size * bits / 8),) uint8, lowest bit first.

    Args:
        codes: any shape, integer, in -2^(bits - 1) .. 2^(bits - 1) - 1; stored in two's complement.
        bits: 1..8.
    Raises:
        ValueError: if a code is out of range.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"Codes of {bits} bits must be in {low}..{high}, but are in {codes.min()}..{codes.max()}.")
    unsigned = codes.reshape(-1, 1).astype(np.int8).view(np.uint8)
    return np.packbits((unsigned >> np.arange(bits, dtype=np.uint8)) & 1, bitorder="little")


def unpack_bits(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the codes that `pack_bits` packed, int8, in the shape `shape`.

    Raises:
        ValueError: if `packed` does not have the number of bytes for the shape.
    """
    size = int(np.prod(shape))
    if packed.size != -(-size * bits // 8):
        raise ValueError(f"{size} codes of {bits} bits take {-(-size * bits // 8)} bytes, but got {packed.size}.")
    stream = np.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    unsigned = (stream << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.int16)
    signed = np.where(unsigned >= 2 ** (bits - 1), unsigned - 2**bits, unsigned)
    return signed.astype(np.int8).reshape(shape)
