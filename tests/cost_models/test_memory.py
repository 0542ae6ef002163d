from dataclasses import replace

import numpy as np

from secateur.cost_models import COST_MODELS, memory

WEIGHTS, PEAK = COST_MODELS["weight_bytes"](), COST_MODELS["peak_activation_bytes"]()


def test_a_dense_float_network_has_four_bytes_per_parameter(tiny):
    weights = 27 * 8 + 9 * 8 + (8 // 2) * 6 + 54 * 5
    parameters = weights + 8 + 5 + 7 + 2 * 8 + 4 * 6  # biases, norms
    np.testing.assert_array_equal(WEIGHTS.total(tiny.shapes()), [4 * parameters])


def test_quantized_layers_store_codes_and_one_scale_per_output_channel(tiny):
    shapes = tiny.shapes([[6, 4]], weight_bits=[[4, 8, 32, 2]])
    expected = [
        27 * 6 * 4 / 8 + 6 * 4,
        9 * 6 + 6 * 4 + 6 * 4,  # scales and biases
        3 * 4 * 4,  # not quantized: no scales
        36 * 5 * 2 / 8 + 5 * 4 + 5 * 4,
    ]
    np.testing.assert_allclose(WEIGHTS.per_layer(shapes), [expected])
    np.testing.assert_allclose(WEIGHTS.total(shapes), [sum(expected) + 4 * (7 + 2 * 6 + 4 * 4)])


def test_the_residual_is_held_until_the_add(tiny):
    shapes = tiny.shapes([[5, 4]])
    stream = 36 * 5
    np.testing.assert_array_equal(PEAK.total(shapes), [4 * 3 * stream])  # the add's two inputs and its output
    expected = [108 + stream, 2 * stream, stream + 36, 36 + 5]
    np.testing.assert_array_equal(PEAK.per_layer(shapes), [4 * np.array(expected)])


def test_a_layer_has_the_worst_of_its_steps_or_nothing(tiny):
    repeated = replace(tiny, step_layer=np.array([1, 1, 1, 2, -1]))
    peaks = PEAK.per_layer(repeated.shapes())
    np.testing.assert_array_equal(peaks, [[0, 4 * 3 * 288, 4 * (288 + 54), 0]])


def test_buffers_are_stored_at_the_largest_bits_of_their_readers(tiny):
    bits = [[8, 8, 4, 2]]
    np.testing.assert_array_equal(
        PEAK.per_layer(tiny.shapes(None, None, bits)),
        [[108 + 288 * 4, 2 * 288 * 4, 288 / 2 + 54 / 4, 54 / 4 + 5 * 4]],
    )
    shared = replace(tiny, buffer_readers=((0,), (), (), (2,), (2, 3), ()))
    np.testing.assert_array_equal(PEAK.per_layer(shared.shapes(None, None, bits))[0, 3], 54 / 2 + 5 * 4)


def test_big_populations_are_worked_off_in_parts(tiny, monkeypatch):
    widths = np.random.default_rng(0).integers(1, tiny.group_units + 1, (11, 2))
    total, per_layer = PEAK.total(tiny.shapes(widths)), PEAK.per_layer(tiny.shapes(widths))
    monkeypatch.setattr(memory, "ROWS_AT_ONCE", 4)
    np.testing.assert_array_equal(PEAK.total(tiny.shapes(widths)), total)
    np.testing.assert_array_equal(PEAK.per_layer(tiny.shapes(widths)), per_layer)
