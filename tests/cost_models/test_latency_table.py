"""Latencies looked up in a table: interpolation along the staircase, corrections, and errors for unknown layers."""

import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from secateur.cost_models import latency_table
from secateur.cost_models.core import InputError, LayerShape, NetworkGeometry
from secateur.cost_models.latency_table import (
    LEAST_SHARE,
    Axis,
    Correction,
    LatencyTable,
    LayerGrid,
    Staircase,
    TableLatency,
    layer_key,
)

CONV = LayerShape("a", "conv", 3, 32, kernel=(3, 3), out_hw=(8, 8), calls=2)
POINTWISE = LayerShape("b", "conv", 32, 32, out_hw=(8, 8))
DEPTHWISE = LayerShape("c", "conv", 32, 32, kernel=(3, 3), out_hw=(8, 8), conv_groups=32)
LINEAR = LayerShape("d", "linear", 32, 10)
LAYERS = (CONV, POINTWISE, DEPTHWISE, LINEAR)


def geometry(layers=LAYERS) -> NetworkGeometry:
    """A chain whose two groups are the outputs of the first, and of the second and third layer."""
    zeros = np.zeros((2, len(layers)))
    ins, outs = zeros.copy(), zeros.copy()
    outs[0, 0] = ins[0, 1] = outs[1, 1] = ins[1, 2] = outs[1, 2] = ins[1, 3] = 1
    return NetworkGeometry(
        layers=tuple(layers),
        group_names=("first", "second"),
        group_units=np.array([32, 32]),
        in_fixed=np.array([3.0, 0, 0, 0]),
        in_per_unit=ins,
        out_fixed=np.array([0.0, 0, 0, 10]),
        out_per_unit=outs,
        other_fixed=0.0,
        other_per_unit=np.zeros(2),
        fixed_macs=0.0,
        buffer_fixed=np.array([192.0, 0, 10]),
        buffer_per_unit=np.array([[0.0, 64, 0], [0, 64, 0]]),
        buffer_readers=((0,), (), ()),
        live=np.array([[1, 1, 0], [0, 1, 1]], bool),
        step_layer=np.array([0, -1]),
    )


def grid(layer: LayerShape, ins: Axis, outs: Axis, precision: str = "float32", factor: float = 1.0) -> LayerGrid:
    """Times in proportion to the product of the counts."""
    rows = tuple(tuple(factor * i * o * 1e-3 for o in outs.counts) for i in ins.counts)
    return LayerGrid(*layer_key(layer), precision, ins, outs, rows)


def table(**changes) -> LatencyTable:
    """A table of all layers in float32 and int8, where int8 takes half the time."""
    axis = Axis((1, 8, 16, 32))
    plans = ((CONV, Axis((3,)), axis), (POINTWISE, axis, axis), (DEPTHWISE, axis, Axis((1,))), (LINEAR, axis, Axis((10,))))
    grids = tuple(
        grid(*plan, precision=name, factor=factor) for name, factor in (("float32", 1.0), ("int8", 0.5)) for plan in plans
    )
    known = LatencyTable("net", "onnxruntime", "1.0", 1, 1, 3, "float32", grids)
    return replace(known, **changes)


def test_times_are_interpolated_between_measured_counts():
    shapes = geometry().shapes([[32, 32], [12, 4]])
    expected = [[2 * 3 * 32, 32 * 32, 32, 320], [2 * 3 * 12, 12 * 4, 4, 40]]  # bilinear functions are exact; `calls` is 2
    np.testing.assert_allclose(TableLatency(table()).per_layer(shapes), 1e-3 * np.array(expected))
    np.testing.assert_allclose(TableLatency(table()).total(shapes), 1e-3 * np.sum(expected, axis=1))


def test_counts_in_one_step_cost_the_same():
    lower, upper, weight = Axis((4, 8, 16, 32, 48), step=16).coordinates()
    counts = np.array(Axis((4, 8, 16, 32, 48)).counts)
    value = counts[lower] * (1 - weight) + counts[upper] * weight
    assert value[[4, 6, 16, 17, 31, 32, 33, 48]].tolist() == [4, 6, 16, 32, 32, 32, 48, 48]


def test_multiples_and_other_counts_are_two_curves():
    axis = Axis((1, 4, 8, 15, 16), (4,), step=4)
    times = np.where(np.array(axis.counts) % 4 == 0, 1.0, 2.0)
    lower, upper, weight = axis.coordinates()
    value = times[lower] * (1 - weight) + times[upper] * weight
    assert value[1:].tolist() == [1.0 if count % 4 == 0 else 2.0 for count in range(1, 17)]


def test_kinds_of_multiples_are_nested():
    axis = Axis((1, 2, 3, 4, 5, 6, 8), (4, 2))
    times = np.array([5, 2, 5, 1, 5, 2, 1.0])
    lower, upper, weight = axis.coordinates()
    value = times[lower] * (1 - weight) + times[upper] * weight
    assert value[1:].tolist() == [5, 2, 5, 1, 5, 2, 5, 1]


def test_a_wider_layer_may_be_faster():
    axis = Axis((1, 4, 8, 15, 16), (4,), step=4)
    rows = tuple((1.0 if count % 4 == 0 else 2.0,) * 2 for count in axis.counts)
    slow = LayerGrid(*layer_key(POINTWISE), "float32", replace(axis, counts=(*axis.counts[:-1], 32)), Axis((1, 32)), rows)
    known = table(grids=(slow, *(g for g in table().grids if g.key != layer_key(POINTWISE))))
    narrow, wide = TableLatency(known).per_layer(geometry().shapes([[7, 32], [8, 32]]))[:, 1]
    assert wide < narrow


def test_a_layer_runs_in_integers_only_if_weights_and_activations_fit():
    model, bits = TableLatency(table(), (8,)), np.full((4, 4), 8)
    bits[1, 1] = 4
    weights, activations = bits.copy(), bits.copy()
    weights[2], activations[3, 1] = 32, 32
    times = model.per_layer(geometry().shapes(np.full((4, 2), 32), weights, activations))
    floats = TableLatency(table()).per_layer(geometry().shapes())[0]
    np.testing.assert_allclose(times[0], floats / 2)
    np.testing.assert_allclose(times[1], floats / 2)
    np.testing.assert_allclose(times[2], floats)
    np.testing.assert_allclose(times[3], floats * [0.5, 1, 0.5, 0.5])


def test_the_correction_is_applied_by_precision():
    corrections = (
        Correction("float32", {"conv": 2.0}, per_layer=0.5, per_megabyte=1000.0),
        Correction("int8", {"pointwise": 3.0}, per_weight_megabyte=2000.0),
    )
    model, plain = TableLatency(table(corrections=corrections), (8,)), TableLatency(table(), (8,))
    eight = np.full((1, 4), 8)
    floats, integers = geometry().shapes(), geometry().shapes(None, eight, eight)
    alone = plain.per_layer(floats)[0]
    np.testing.assert_allclose(model.per_layer(floats)[0], alone * [2, 1, 1, 1] + 0.5 * np.array([2, 1, 1, 1]))
    moved = 4 * 10  # bytes that the step without a layer writes; `live` has no end for what it reads
    assert model.total(floats)[0] == pytest.approx(model.per_layer(floats).sum() + moved * 1e-3)
    weights = np.array([3 * 32 * 9, 32 * 32, 32 * 9, 320])
    in_integers = model.per_layer(integers, eight)[0]
    np.testing.assert_allclose(in_integers, alone / 2 * [1, 3, 1, 1] + 2e-3 * weights)


def test_a_correction_leaves_something_of_every_layer():
    known = table(corrections=(Correction("float32", per_layer=-1000.0),))
    shapes = geometry().shapes()
    np.testing.assert_allclose(TableLatency(known).per_layer(shapes), LEAST_SHARE * TableLatency(table()).per_layer(shapes))


def test_values_between_precisions_are_converted():
    bits = np.array([[8, 32, 32, 8]])
    model, plain = TableLatency(table(border=1e6), (8,)), TableLatency(table(), (8,))
    shapes = geometry().shapes(None, bits, bits)
    converted = 2 * 3 * 64 + 32 * 64 + 32  # inputs of the first, second and fourth layer; images come in float
    assert model.total(shapes, bits)[0] - plain.total(shapes, bits)[0] == pytest.approx(converted)


def test_integers_are_executed_if_they_are_faster():
    """Int8 takes half the time of every layer of `table`; it takes twice the time in the other one."""
    eight = np.full((1, 4), 8)
    shapes = geometry().shapes(None, eight, eight)
    assert TableLatency(table(), (8,)).executed(shapes).tolist() == [[8, 8, 8, 8]]
    floats = tuple(g for g in table().grids if g.precision == "float32")
    doubled = tuple(
        replace(g, precision="int8", milliseconds=tuple(tuple(2 * t for t in row) for row in g.milliseconds)) for g in floats
    )
    slow = TableLatency(table(grids=floats + doubled), (8,))
    assert slow.executed(shapes).tolist() == [[32, 32, 32, 32]]
    assert slow.total(shapes)[0] == pytest.approx(slow.total(geometry().shapes())[0])
    assert slow.total(shapes)[0] < slow.total(shapes, eight)[0]
    np.testing.assert_allclose(slow.per_layer(shapes), slow.per_layer(geometry().shapes()))


@pytest.mark.parametrize(("factor", "mixes"), [(1.5, False), (40.0, True)])
def test_precisions_are_mixed_only_where_that_is_clearly_faster(factor, mixes):
    """Int8 takes `factor` times as long in the depthwise layer, a small one, and half as long in the others."""
    axis = Axis((1, 8, 16, 32))
    slower = grid(DEPTHWISE, axis, Axis((1,)), "int8", factor)
    known = table(grids=tuple(slower if g.key == slower.key and g.precision == "int8" else g for g in table().grids))
    model, eight = TableLatency(known, (8,)), np.full((1, 4), 8)
    shapes = geometry().shapes(None, eight, eight)
    assert model.executed(shapes).tolist() == [[8, 8, 32, 8] if mixes else [8, 8, 8, 8]]


@pytest.mark.parametrize(("milliseconds", "executed"), [(0.2, 8), (0.3, 32)])
def test_a_conversion_that_costs_more_than_integers_save_is_not_made(milliseconds, executed):
    """Int8 saves 0.51 ms of the pointwise layer; its input is converted, and so is that of the next layer, of equal size."""
    bits = np.array([[32, 8, 32, 32]])
    model = TableLatency(table(border=1e6 * milliseconds / (32 * 64)), (8,))
    assert model.executed(geometry().shapes(None, bits, bits)).tolist() == [[32, executed, 32, 32]]


@pytest.mark.parametrize("border", [0.0, 2.0, 50.0])
def test_the_fastest_of_all_executions_is_found(border, monkeypatch):
    monkeypatch.setattr(latency_table, "WORTH_MIXING", 1.0)
    rng = np.random.default_rng(0)
    grids = tuple(replace(g, milliseconds=tuple(map(tuple, rng.random(np.shape(g.milliseconds))))) for g in table().grids)
    corrections = (Correction("float32", per_megabyte=2000.0), Correction("int8", per_layer=0.1, per_megabyte=3000.0))
    model = TableLatency(table(grids=grids, corrections=corrections, border=border), (8,))
    bits = rng.choice([8, 32], (50, 4), p=[0.8, 0.2])
    shapes = geometry().shapes(rng.integers(1, 33, (50, 2)), bits, bits)
    executions = [np.where(list(in_float), 32, bits) for in_float in product([False, True], repeat=4)]
    totals = np.array([model.total(shapes, executed) for executed in executions])
    np.testing.assert_allclose(model.total(shapes), totals.min(axis=0))
    assert len({executed.tobytes() for executed in model.executed(shapes)}) > 1


@pytest.mark.parametrize("change", [{"kernel": (5, 5)}, {"stride": (2, 2)}, {"out_hw": (4, 4)}, {"out_channels": 64}])
def test_unknown_layers_are_named(change):
    layers = (replace(CONV, **change), *LAYERS[1:])
    with pytest.raises(InputError, match=r"no float32 times for layer 'a' .*profile this model"):
        TableLatency(table()).total(geometry(layers).shapes())


def test_a_precision_that_was_not_measured_is_named():
    known = table(grids=tuple(g for g in table().grids if g.precision == "float32"))
    eight = np.full((1, 4), 8)
    with pytest.raises(InputError, match="no int8 times for layer 'a'"):
        TableLatency(known, (8,)).total(geometry().shapes(None, eight, eight))


def test_only_multiples_that_pay_are_recommended():
    counts = tuple(range(1, 33))

    def stairs(gain: float) -> Staircase:
        times = tuple((1.0 if count % 8 == 0 else gain) for count in counts)
        return Staircase("conv", "out", "int8", "a", (8,), 8, counts, times)

    assert table(staircases=(stairs(1.5),)).channel_multiple == 8
    assert table(staircases=(stairs(1.05),)).channel_multiple == 1
    assert table().channel_multiple == 1


def test_grids_must_be_complete():
    with pytest.raises(InputError, match="one row per in-channel count"):
        LayerGrid(*layer_key(CONV), "float32", Axis((1, 2)), Axis((1, 2)), ((1.0, 2.0),))


def test_pickles_and_answers_each_row_alone():
    model = pickle.loads(pickle.dumps(TableLatency(table(), (8,))))
    rng = np.random.default_rng(0)
    bits = rng.choice([4, 8, 32], (4096, 4))
    shapes = geometry().shapes(rng.integers(1, 33, (4096, 2)), bits, bits)
    rows = model.total(shapes)
    alone = geometry().shapes(shapes.widths[7], shapes.weight_bits[7], shapes.activation_bits[7])
    assert model.total(alone)[0] == pytest.approx(rows[7])
