from dataclasses import replace

import numpy as np

from secateur.cost_models import COST_MODELS

MACS, BOPS = COST_MODELS["macs"](), COST_MODELS["bops"]()


def test_macs_follow_the_textbook_formulas(tiny):
    stem, mid = 5, 4
    expected = [
        36 * 9 * 3 * stem,
        36 * 9 * stem,  # depthwise: one input channel per output channel
        9 * (stem / 2) * mid,  # two conv groups: half of the inputs per output
        9 * mid * 5,  # nine flattened features per unit
    ]
    shapes = tiny.shapes([[stem, mid]])
    np.testing.assert_allclose(MACS.per_layer(shapes), [expected])
    np.testing.assert_allclose(MACS.total(shapes), [sum(expected) + 100])


def test_a_layer_that_runs_twice_counts_twice(tiny):
    twice = replace(tiny, layers=(*tiny.layers[:3], replace(tiny.layers[3], calls=2)))
    difference = MACS.per_layer(twice.shapes()) - MACS.per_layer(tiny.shapes())
    np.testing.assert_array_equal(difference, [[0, 0, 0, 54 * 5]])


def test_bops_multiply_with_both_bit_widths(tiny):
    weight_bits, activation_bits = np.array([[8, 4, 2, 32]]), np.array([[32, 8, 4, 8]])
    shapes = tiny.shapes(None, weight_bits, activation_bits)
    expected = MACS.per_layer(shapes) * weight_bits * activation_bits
    np.testing.assert_allclose(BOPS.per_layer(shapes), expected)
    np.testing.assert_allclose(BOPS.total(shapes), expected.sum() + 100 * 32 * 32)
