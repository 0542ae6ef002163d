"""A b-bit code takes b bits, and comes back."""

import numpy as np
import pytest

from secateur.envs.quantization.packing import pack_bits, unpack_bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (1,), (5, 8), (0, 4)])
def test_round_trip_in_exactly_bits_per_code(bits, shape):
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == np.uint8 and packed.size == -(-codes.size * bits // 8)
    back = unpack_bits(packed, bits, shape)
    assert back.dtype == np.int8 and np.array_equal(back, codes)


def test_layout_is_lowest_bit_first():
    # 4-bit codes 1 and -1 (1111) share a byte, the first in the low half.
    assert pack_bits(np.array([1, -1]), 4).tolist() == [0b1111_0001]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"-2\.\.1"):
        pack_bits(np.array([2]), 2)
    with pytest.raises(ValueError, match="2 bytes"):
        unpack_bits(np.zeros(3, np.uint8), 4, (4,))
