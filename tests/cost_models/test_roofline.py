"""Analytic latency and energy: the formulas, written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from secateur.cost_models.core import InputError
from secateur.cost_models.energy import CountedEnergy, Energy
from secateur.cost_models.precision import executed_precision
from secateur.cost_models.roofline import Roofline, RooflineLatency
from secateur.cost_models.traffic import Traffic

FLOATS, INTEGERS = Traffic("float32", ()), Traffic("float32", (8,))
STEM, MID = 5, 4
MACS = np.array([36 * 9 * 3 * STEM, 36 * 9 * STEM, 9 * (STEM / 2) * MID, 9 * MID * 5])
WEIGHTS = np.array([27 * STEM, 9 * STEM, STEM / 2 * MID, 9 * MID * 5])
INPUTS = np.array([36 * 3, 36 * STEM, 9 * 4 * STEM, 9 * MID])  # the grouped convolution has stride 2
OUTPUTS = np.array([36 * STEM, 36 * STEM, 9 * MID, 5])
ADDED = 36 * STEM  # the sum of two buffers is written to a third


@pytest.fixture
def shapes(tiny):
    return tiny.shapes([[STEM, MID]])


def quantized(tiny, weight_bits, activation_bits):
    return tiny.shapes([[STEM, MID]], [weight_bits], [activation_bits])


def test_integer_kernels_need_both_operands():
    weights, activations = np.array([[4, 8, 8, 2, 32, 16]]), np.array([[8, 4, 32, 4, 8, 16]])
    assert executed_precision(weights, activations, (8,)).tolist() == [[8, 8, 32, 8, 32, 32]]
    assert executed_precision(weights, activations, (8, 4)).tolist() == [[8, 8, 32, 4, 32, 32]]
    assert executed_precision(weights, activations, ()).tolist() == [[32] * 6]


def test_a_layer_takes_its_arithmetic_where_memory_is_fast(shapes):
    model = RooflineLatency(Roofline({"float32": 1e6}, 1e15), FLOATS)
    np.testing.assert_allclose(model.per_layer(shapes), [MACS / 1e3])
    np.testing.assert_allclose(model.total(shapes), [(MACS.sum() + 100) / 1e3])  # 100 of products without weights


def test_a_layer_takes_its_traffic_where_memory_is_slow(shapes):
    model = RooflineLatency(Roofline({"float32": 1e15}, 1e6), FLOATS)
    moved = 4 * (WEIGHTS + INPUTS + OUTPUTS)
    np.testing.assert_allclose(model.per_layer(shapes), [moved / 1e3])
    np.testing.assert_allclose(model.total(shapes), [(moved.sum() + 4 * 3 * ADDED) / 1e3])


def test_every_layer_and_every_other_step_costs_its_overhead(shapes):
    model = RooflineLatency(Roofline({"float32": 1e18}, 1e18, layer_overhead_us=10, step_overhead_us=3), FLOATS)
    np.testing.assert_allclose(model.per_layer(shapes), [[0.01] * 4], rtol=1e-4)
    np.testing.assert_allclose(model.total(shapes), [0.043], rtol=1e-4)


def test_precisions_have_their_own_peak_and_width(tiny):
    shapes = quantized(tiny, [8, 4, 8, 32], [8, 8, 32, 32])
    fast = RooflineLatency(Roofline({"float32": 1e6, "int8": 4e6}, 1e15), INTEGERS)
    np.testing.assert_allclose(fast.per_layer(shapes), [MACS / [4e3, 4e3, 1e3, 1e3]])
    slow = RooflineLatency(Roofline({"float32": 1e15, "int8": 1e15}, 1e6), INTEGERS)
    np.testing.assert_allclose(slow.per_layer(shapes), [(WEIGHTS + INPUTS + OUTPUTS) * [1, 1, 4, 4] / 1e3])


def test_half_precision_moves_half(tiny, shapes):
    half = Traffic("bfloat16", (8,))
    np.testing.assert_allclose(half.layers(shapes, half.executed(shapes)), [2 * (WEIGHTS + INPUTS + OUTPUTS)])
    moved, steps = half.other_steps(shapes)
    assert moved == [2 * 3 * ADDED] and steps == 1


def test_a_sum_in_place_moves_three_times_its_operand(tiny):
    live = tiny.live.copy()
    live[2:, 1] = [1, 1, 0]  # the sum is written over the stem's output; what it would have been written to is never there
    live[:, 3] = False
    moved, steps = FLOATS.other_steps(replace(tiny, live=live).shapes([[STEM, MID]]))
    assert moved == [4 * 3 * ADDED] and steps == 1


def test_energy_counts_arithmetic_and_bytes(tiny):
    shapes = quantized(tiny, [8, 8, 32, 32], [8, 8, 32, 32])
    model = CountedEnergy(Energy({"float32": 4.6, "int8": 0.3}, 10.0), INTEGERS)
    per_layer = MACS * [0.3, 0.3, 4.6, 4.6] + 10 * (WEIGHTS + INPUTS + OUTPUTS) * [1, 1, 4, 4]
    np.testing.assert_allclose(model.per_layer(shapes), [1e-9 * per_layer])
    np.testing.assert_allclose(model.total(shapes), [1e-9 * (per_layer.sum() + 100 * 4.6 + 10 * 4 * 3 * ADDED)])


@pytest.mark.parametrize(
    "figures", [{"bytes_per_second": 0}, {"macs_per_second": {"float32": -1.0}}, {"layer_overhead_us": float("nan")}]
)
def test_figures_that_are_none(figures):
    with pytest.raises(InputError, match=next(iter(figures))):
        Roofline(**{"macs_per_second": {"float32": 1.0}, "bytes_per_second": 1.0, **figures})
