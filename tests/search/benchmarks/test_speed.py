"""The benchmark of speed: what it prunes, what it measures, what its table says."""

import numpy as np
import pytest

from secateur.cost_models.macs import Macs
from secateur.envs.core import InputError
from secateur.search.benchmarks import speed
from secateur.search.profiling.runtimes import Latency


@pytest.fixture(scope="module")
def network():
    return speed.random_model("secateur.envs.tasks.cifar_resnet:resnet20", 32)


def macs(geometry, widths):
    return Macs().total(geometry.shapes(widths))[0]


@pytest.mark.parametrize(("share", "multiple"), [(0.5, 1), (0.2, 4), (0.3, 8)])
def test_uniform_widths_use_the_share_and_respect_the_multiple(network, share, multiple):
    geometry = network[1].geometry
    widths = speed.uniform_widths(geometry, share, multiple)
    assert not (widths % multiple).any() and (widths <= geometry.group_units).all()
    assert macs(geometry, widths) <= share * macs(geometry, geometry.group_units)
    more = np.minimum(widths + multiple, geometry.group_units)
    assert macs(geometry, more) > share * macs(geometry, geometry.group_units)


def test_a_share_out_of_reach_is_refused(network):
    with pytest.raises(InputError, match="multiples of 16 leave at least"):
        speed.uniform_widths(network[1].geometry, 0.01, 16)


def test_all_versions_are_measured(network):
    versions = speed.measure_speed(*network, (3, 32, 32), 0.3, 4, seconds=0.01)
    assert [version.name for version in versions] == ["dense", "pruned", "int8", "pruned, int8"]
    dense, pruned, integer, both = (version.file_bytes for version in versions)
    assert dense > pruned > both and dense > 2.5 * integer > 2.5 * both
    assert versions[1].macs == versions[3].macs <= 0.3 and versions[0].macs == 1
    assert all(version.latency.milliseconds > 0 for version in versions)
    rows = speed.speed_rows("resnet20", versions)
    assert len(rows) == 4 and "| resnet20 | dense | 100.0 |" in rows[0] and "| 1.00 |" in rows[0]


def test_memory_is_what_the_model_adds():
    small, large = (_model_with_weights(count) for count in (10, 4_000_000))
    image = np.zeros((1, 3, 8, 8), np.float32)
    found = [speed.peak_memory(content, image, "onnxruntime", "float32", 1) for content in (small, large)]
    assert found == [None, None] or found[1] - found[0] >= 15e6  # 16 MB of weights


def _model_with_weights(count):
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(0).random(count, np.float32), "weights")
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 3, 8, 8])
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])
    # Scaled by the input's first value, so that the weights cannot be folded away.
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["top"], keepdims=0),
        helper.make_node("Mul", ["weights", "top"], ["scaled"]),
        helper.make_node("ReduceMax", ["scaled"], ["largest"], keepdims=0),
        helper.make_node("Add", ["input", "largest"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "scaled", [image], [output], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def test_ratios_are_to_the_dense_network():
    versions = [
        speed.Version("dense", 1.0, Latency(4.0, 3.9, 4.2, 10), 8_000_000, 6_000_000),
        speed.Version("pruned, int8", 0.2, Latency(1.0, 0.9, 1.1, 10), 1_000_000, 2_000_000),
    ]
    row = speed.speed_rows("net", versions)[1]
    assert row == "| net | pruned, int8 | 20.0 | 1.00 (0.90 to 1.10) | 4.00 | 1.00 | 8.00 | 2.0 | 3.00 |"
