"""Runtimes: sessions, latencies, operator times, and what they say when something is missing."""

import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

from secateur.envs.core import InputError
from secateur.search.profiling.layer_models import LayerPoint, layers_model, times_by_point
from secateur.search.profiling.runtimes import RUNTIMES, WARM_UP, fastest, measure_latencies, measure_latency, open_session

KEYS = {
    "conv": ("conv", (3, 3), (1, 1), (8, 8), 1),
    "strided": ("conv", (3, 3), (2, 2), (4, 4), 1),
    "patches": ("conv", (4, 4), (4, 4), (2, 2), 1),
    "pointwise": ("conv", (1, 1), (1, 1), (8, 8), 1),
    "depthwise": ("conv", (3, 3), (1, 1), (8, 8), 0),
    "grouped": ("conv", (3, 3), (1, 1), (8, 8), 4),
    "linear": ("linear", (1, 1), (1, 1), (1, 1), 1),
    "tokens": ("linear", (1, 1), (1, 1), (9, 1), 1),
}


@pytest.fixture
def doubling(tmp_path):
    """A model that doubles its input."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "input"], ["logits"])],
        "doubling",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
    )
    path = tmp_path / "doubling.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_sessions_run_files_and_bytes(doubling, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for model in (doubling, str(doubling), doubling.read_bytes()):
        np.testing.assert_array_equal(open_session(model, runtime).run(values)[0], 2 * values)


def test_latency_is_a_median_between_quantiles(doubling):
    latency = measure_latency(open_session(doubling), np.ones((1, 3), np.float32), seconds=0.01)
    assert 0 < latency.low <= latency.milliseconds <= latency.high
    assert latency.repeats >= 10


def test_sessions_take_turns(doubling):
    order = []

    class Recorded:
        threads = 1

        def __init__(self, name):
            self.name = name

        def run(self, images):
            order.append(self.name)

    latencies = measure_latencies([Recorded("a"), Recorded("b")], np.ones(1), seconds=0.0, least_repeats=6)
    turns = "".join(order[2 * WARM_UP :])
    assert turns == "aaaabbbb" * 2  # one run that is not timed, three that are
    assert [latency.repeats for latency in latencies] == [6, 6]


def test_unknown_names_and_broken_files_are_one_sentence(tmp_path, doubling):
    with pytest.raises(InputError, match="no runtime `tensorrt`; choose one of onnxruntime, openvino, pytorch"):
        open_session(doubling, "tensorrt")
    with pytest.raises(InputError, match="onnxruntime cannot execute bfloat16; it knows float32, int8"):
        open_session(doubling, precision="bfloat16")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    for path in (tmp_path / "broken.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(InputError, match=f"ONNX Runtime cannot load .*{path.name}: .*") as error:
            open_session(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="choose onnxruntime or openvino"):
        open_session(doubling, "pytorch")


def test_a_missing_openvino_names_the_extra(doubling, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"OpenVINO is not installed: pip install 'secateur\[openvino\]'."):
        open_session(doubling, "openvino")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", KEYS)
def test_every_layer_of_a_model_is_timed(name, precision, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    # Multiples of 16 and other counts get different kernels, which the profiles name differently.
    points = [LayerPoint(KEYS[name], count, count) for count in (4, 12, 16, 20)]
    model, feeds = layers_model(points, precision)
    times = RUNTIMES[runtime].operator_times(model, feeds, 1, precision, seconds=0.0, repeats=6)
    by_point = times_by_point(times, len(points))
    assert len(by_point) == 4
    assert all(len(values) >= 2 and np.all(values >= 0) for values in by_point)


def test_the_output_of_a_layer_model_has_the_size_of_its_key():
    for key in KEYS.values():
        point = LayerPoint(key, 8, 8)
        model, feeds = layers_model([point], "float32")
        (output,) = open_session(model).session.run(None, feeds)
        assert output.size == point.tokens if key[3] != (1, 1) and key[0] == "conv" else output.shape[0] == 1


def test_a_layer_without_operators_is_no_silent_zero():
    with pytest.raises(ValueError, match="no operator of layer 1"):
        times_by_point({"layer0_nchwc": np.ones(3), "ReorderInput": np.ones(3)}, 2)


def test_disturbed_repeats_do_not_count():
    assert fastest(np.array([1.0, 1.0, 9.0, 9.0])) == pytest.approx(1.0005)
