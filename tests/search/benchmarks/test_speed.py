"""The benchmark of speed: what it prunes, what it measures, what its table says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.cost_models.macs import Macs
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.tasks.synthetic import SyntheticNet
from secateur.search.benchmarks import speed
from secateur.search.benchmarks.peak_memory import peak_memory
from secateur.search.profiling.runtimes import Latency


@pytest.fixture(scope="module")
def geometry(resnet_graph):
    return resnet_graph.geometry


def macs(geometry, widths):
    return Macs().total(geometry.shapes(widths))[0]


@pytest.mark.parametrize(("share", "multiple"), [(0.5, 1), (0.2, 4), (0.3, 8)])
def test_uniform_widths_use_the_share_and_respect_the_multiple(geometry, share, multiple):
    widths = np.array(speed.uniform_widths(geometry, share, multiple))
    assert not (widths % multiple).any() and (widths <= geometry.group_units).all()
    assert macs(geometry, widths) <= share * macs(geometry, geometry.group_units)
    more = np.minimum(widths + multiple, geometry.group_units)
    assert macs(geometry, more) > share * macs(geometry, geometry.group_units)


def test_a_share_out_of_reach_is_refused(geometry):
    with pytest.raises(InputError, match="multiples of 16 leave at least"):
        speed.uniform_widths(geometry, 0.01, 16)


def test_all_versions_are_measured(monkeypatch):
    model = SyntheticNet(32).eval()
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),), verify=False)
    monkeypatch.setattr(speed, "peak_memory", lambda content, *rest: 3 * len(content))
    config = speed.SpeedConfig(share=0.3, multiple=4, seconds=0.01)
    versions = speed.measure_speed(model, graph, 8, "onnxruntime", config)
    assert [version.name for version in versions] == ["dense", "pruned", "int8", "pruned, int8"]
    dense, pruned, integer, both = (version.file_bytes for version in versions)
    assert dense > pruned > both and dense > 2.5 * integer > 2.5 * both
    assert versions[1].macs == versions[3].macs <= 0.3 and versions[0].macs == versions[2].macs == 1
    assert all(version.latency.milliseconds > 0 and version.memory_bytes == 3 * version.file_bytes for version in versions)


def test_memory_is_what_the_model_adds():
    small, large = (_model_with_weights(count) for count in (10, 4_000_000))
    image = np.zeros((1, 3, 8, 8), np.float32)
    found = [peak_memory(content, image, "onnxruntime", 1) for content in (small, large)]
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
    cells = ["net", "pruned, int8", "20.0", "1.00 (0.90 to 1.10)", "4.00", "1.00", "8.00", "2.0", "3.00"]
    assert speed.speed_cells("net", versions)[1] == cells
    unknown = [replace(version, memory_bytes=None) for version in versions]
    assert speed.speed_cells("net", unknown)[1] == [*cells[:-2], "-", "-"] and len(cells) == len(speed.HEADS)


def test_a_network_is_named_with_its_image_size():
    assert speed.factory_and_size("torchvision:resnet18:224") == ("torchvision:resnet18", 224)
    for wrong in ("torchvision:resnet18", "resnet18:224", "a:b:"):
        with pytest.raises(InputError, match="FACTORY:HEIGHT"):
            speed.factory_and_size(wrong)
