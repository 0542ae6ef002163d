"""What every cost model promises, over random networks: those that hold everywhere, and those of devices."""

import pickle

import numpy as np
import pytest

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import LayerShape, NetworkGeometry
from secateur.cost_models.device import SHIPPED, read_device
from secateur.cost_models.latency_table import Axis, Correction, LatencyTable, LayerGrid, TableLatency, layer_key

POPULATION = 40


def random_geometry(rng: np.random.Generator) -> NetworkGeometry:
    """A random geometry: unlike in a network its layers do not fit together, but every quantity is affine in the widths."""
    num_layers, num_groups, num_buffers, num_steps = rng.integers(1, 7, 4)

    def counts(*shape, high=4):
        return rng.integers(0, high, shape).astype(float)

    layers = tuple(
        LayerShape(
            f"layer{i}",
            "conv",
            in_channels=8,
            out_channels=8,
            kernel=(3, 3),
            out_hw=tuple(rng.integers(1, 5, 2).tolist()),
            conv_groups=int(rng.choice([1, 2, 8])),
            calls=int(rng.integers(1, 3)),
            has_bias=bool(rng.integers(2)),
        )
        for i in range(num_layers)
    )
    readers = tuple(tuple(rng.choice(num_layers, rng.integers(0, num_layers + 1), replace=False)) for _ in range(num_buffers))
    return NetworkGeometry(
        layers=layers,
        group_names=tuple(f"group{i}" for i in range(num_groups)),
        group_units=rng.integers(1, 33, num_groups),
        in_fixed=counts(num_layers) + 1,
        in_per_unit=counts(num_groups, num_layers),
        out_fixed=counts(num_layers) + 1,
        out_per_unit=counts(num_groups, num_layers),
        other_fixed=float(rng.integers(100)),
        other_per_unit=counts(num_groups),
        fixed_macs=float(rng.integers(100)),
        buffer_fixed=counts(num_buffers, high=100),
        buffer_per_unit=counts(num_groups, num_buffers, high=50),
        buffer_readers=readers,
        live=rng.random((num_steps, num_buffers)) < 0.6,
        step_layer=rng.integers(-1, num_layers, num_steps),
    )


def random_population(geometry: NetworkGeometry, rng: np.random.Generator):
    """Widths and bits of a population."""
    full = (POPULATION, len(geometry.layers))
    widths = rng.integers(1, geometry.group_units + 1, (POPULATION, len(geometry.group_units)))
    return widths, rng.choice([2, 3, 4, 8, 16, 32], full), rng.choice([2, 4, 8, 32], full)


def random_sequence(geometry: NetworkGeometry, rng: np.random.Generator) -> LatencyTable:
    """Times for every layer of a network in float32 and int8, up and down at random."""
    dense = geometry.shapes()
    largest = int(max(dense.in_channels.max(), dense.out_channels.max()))
    axis = Axis(tuple(sorted({1, 5, max(largest // 2, 8), max(largest, 9)})), multiples=(2,))
    size = len(axis.counts)

    def grid(key, precision):
        columns = 1 if key[-1] == 0 else size
        times = tuple(tuple(row) for row in rng.random((size, columns)).tolist())
        return LayerGrid(*key, precision, axis, axis if columns > 1 else Axis((1,)), times)

    keys = dict.fromkeys(map(layer_key, geometry.layers))
    grids = tuple(grid(key, precision) for key in keys for precision in ("float32", "int8"))
    corrections = (Correction("float32", {"conv": 1.1}, 0.2, 0.1), Correction("int8", {}, 0.1, 0.1))
    return LatencyTable("test", "onnxruntime", "1", 1, 1, 1, "float32", grids, corrections=corrections, border=0.3)


def _always(model):
    return lambda geometry: model


MONOTONE = {name: _always(model()) for name, model in COST_MODELS.items()} | {
    f"{name} of {path.stem}": _always(model)
    for path in sorted(SHIPPED.glob("*.json"))
    for name, model in read_device(path).cost_models().items()
}
MODELS = {
    **MONOTONE,
    "latency_ms of a table": lambda geometry: TableLatency(random_sequence(geometry, np.random.default_rng(0)), (8,)),
}
"""{name: function (geometry) -> cost model}."""


@pytest.fixture(params=MODELS)
def model_of(request):
    return MODELS[request.param]


def test_is_named_as_registered_and_pickles():
    geometry = random_geometry(np.random.default_rng(0))
    for name, make in MODELS.items():
        model = make(geometry)
        assert model.name == name.partition(" ")[0]
        model.total(geometry.shapes())  # what it remembers is pickled too
        assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", MONOTONE)
def test_never_cheaper_with_more_channels_or_bits(name, seed):
    rng = np.random.default_rng(seed)
    geometry = random_geometry(rng)
    model = MONOTONE[name](geometry)
    small, large = random_population(geometry, rng), random_population(geometry, rng)
    for vary in range(3):
        larger = list(small)
        larger[vary] = np.maximum(small[vary], large[vary])
        low, high = geometry.shapes(*small), geometry.shapes(*larger)
        assert np.all(model.per_layer(low) <= model.per_layer(high) * (1 + 1e-12))
        assert np.all(model.total(low) <= model.total(high) * (1 + 1e-12))


@pytest.mark.parametrize("seed", range(3))
def test_a_row_does_not_depend_on_the_rest_of_the_population(model_of, seed):
    rng = np.random.default_rng(seed)
    geometry = random_geometry(rng)
    model = model_of(geometry)
    population = random_population(geometry, rng)
    shapes = geometry.shapes(*population)
    assert model.per_layer(shapes).shape == (POPULATION, len(geometry.layers))
    assert model.total(shapes).shape == (POPULATION,)
    for row in (0, POPULATION - 1):
        alone = geometry.shapes(*(part[row] for part in population))
        np.testing.assert_allclose(model.per_layer(alone)[0], model.per_layer(shapes)[row])
        np.testing.assert_allclose(model.total(alone)[0], model.total(shapes)[row])
    order = rng.permutation(POPULATION)
    permuted = geometry.shapes(*(part[order] for part in population))
    np.testing.assert_allclose(model.total(permuted), model.total(shapes)[order])
    np.testing.assert_allclose(model.per_layer(permuted), model.per_layer(shapes)[order])


def test_total_covers_every_layer(model_of):
    rng = np.random.default_rng(0)
    for _ in range(10):
        geometry = random_geometry(rng)
        model, shapes = model_of(geometry), geometry.shapes(*random_population(geometry, rng))
        per_layer = model.per_layer(shapes)
        assert np.isfinite(per_layer).all() and (per_layer >= 0).all()
        least = per_layer.max(axis=1) if model.name.startswith("peak") else per_layer.sum(axis=1)
        assert np.isfinite(model.total(shapes)).all() and np.all(model.total(shapes) >= least * (1 - 1e-12))
