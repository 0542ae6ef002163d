"""ONNX files: they compute what the network computes, with the searched codes in them, and notes say where they do not."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS, ActivationGrid, QuantizedWeight
from secateur.search.export import onnx_export
from secateur.search.export.onnx_export import export_onnx
from secateur.search.profiling.runtimes import open_session

SHAPE = (3, 16, 16)
CLOSE = 0.05
"""Mean difference of the logits in standard deviations: outputs and sums are on grids of 256 values in the file only. Measured:
at most 0.01 over five seeds, if the runtime does not saturate; a wrong grid or code gives 0.3 or more."""


class ConvNet(nn.Module):
    """Residual, depthwise, squeeze-excite, linear; batch norms, one with a negative and one with a zero gain."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.depthwise_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.project, self.project_norm = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.plain, self.plain_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.project_norm(self.project(F.relu6(self.depthwise_norm(self.depthwise(x)))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = F.relu(x + y * scale)
        x = F.relu(x + self.plain_norm(self.plain(x)))
        return self.linear(x.mean((2, 3)))


class TokenNet(nn.Module):
    """Patches, then layer norm and two linear layers for each token, as in ViT and ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.norm, self.grow, self.shrink = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.shrink(F.gelu(self.grow(self.norm(tokens))))
        return self.head(tokens.mean(1))


def made(factory):
    """A network with statistics of its own, its plan, and images."""
    torch.manual_seed(0)
    network, images = factory(), torch.randn(64, *SHAPE)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None
    network.train()(images)
    network.eval()
    if factory is ConvNet:
        network.stem_norm.weight.data[0] *= -1
        network.plain_norm.weight.data[1] = 0
    return network, analyze(network, (images[:1],)), images


@pytest.fixture(scope="module")
def conv_net():
    return made(ConvNet)


@pytest.fixture(scope="module")
def token_net():
    return made(TokenNet)


def quantized(dense, bits, quantizer="uniform"):
    """The network with simulated quantization; bits: {layer: (weight, activation)} or one pair for all."""
    model, graph, images = dense
    names = [layer.name for layer in graph.geometry.layers]
    bits = bits if isinstance(bits, dict) else dict.fromkeys(names, bits)
    calibration = calibrate(model, graph, images, CalibrationConfig())
    config, make = QUANTIZERS[quantizer]
    kept = [np.arange(group.units) for group in graph.groups]
    candidate = CandidateNetwork(
        copy.deepcopy(model), model, graph, kept, bits, make(config()), calibration, images, PieceCache()
    )
    candidate.quantize_inputs()
    candidate.quantize_weights()
    return candidate.network


def run(path, images):
    return open_session(path).run(images.numpy())[0]


@torch.no_grad()
def compare(network, path, images):
    """Mean difference in standard deviations of the logits, and the share of the same answers."""
    expected, found = network(images).numpy(), run(path, images)
    return np.abs(found - expected).mean() / expected.std(), (found.argmax(1) == expected.argmax(1)).mean()


def stored_weights(path):
    """{name: (codes, scale)} of all weights that are stored as integers."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    return {
        name.removesuffix("_quantized"): (codes, constants[name.removesuffix("_quantized") + "_scale"])
        for name, codes in constants.items()
        if name.endswith("_quantized") and codes.dtype == np.int8
    }


def images_like(dense, count=200):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dense", ["conv_net", "token_net"])
def test_a_float_network_gives_the_same_outputs_in_any_batch(dense, request, tmp_path):
    network, graph, images = request.getfixturevalue(dense)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    executed = export_onnx(network, graph, images, tmp_path / "model.onnx")
    assert [layer.name for layer in executed] == [layer.name for layer in graph.geometry.layers]
    assert {(layer.weight_bits, layer.activation_bits, layer.executed, layer.note) for layer in executed} == {
        (32, 32, "float32", "")
    }
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    for batch in (images[:1], images[:7]):
        with torch.no_grad():
            assert np.abs(run(tmp_path / "model.onnx", batch) - network(batch).numpy()).max() < 1e-4
    after = network.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def eight_bits(conv_net, tmp_path_factory):
    """The network with 8 bits everywhere, its file, and the execution of its layers."""
    network, path = quantized(conv_net, (8, 8)), tmp_path_factory.mktemp("eight") / "model.onnx"
    with torch.no_grad():
        before = network(conv_net[2])
        executed = export_onnx(network, conv_net[1], conv_net[2], path)
        assert torch.equal(network(conv_net[2]), before), "the export has changed the network"
    assert all(quantized_weight(network.get_submodule(layer.name)) for layer in conv_net[1].geometry.layers)
    return network, path, executed


def test_eight_bits_become_integers_with_the_networks_own_codes(conv_net, eight_bits):
    network, path, executed = eight_bits
    assert all(layer.executed == "int8" and layer.note == "" and not layer.kept_in_float for layer in executed)
    stored = stored_weights(path)
    norms = dict(conv_net[1].batch_norms)
    for layer in executed:
        weight = quantized_weight(network.get_submodule(layer.name))
        gain = np.ones(len(weight.scale), np.float32)
        if layer.name in norms:
            norm = network.get_submodule(norms[layer.name])
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        codes, scale = stored[f"{layer.name}.weight"]
        sign = np.sign(gain).reshape(-1, *[1] * (codes.ndim - 1))
        assert np.array_equal(codes, weight.codes.numpy() * sign), layer.name
        assert np.allclose(scale[gain != 0], (weight.scale.numpy() * np.abs(gain))[gain != 0], rtol=1e-5), layer.name
    images = images_like(conv_net)
    difference, same = compare(network, path, images)
    assert difference < CLOSE and same > 0.9
    assert np.allclose(run(path, images[:1]), run(path, images[:7])[:1], atol=1e-4)
    onnx.checker.check_model(path, full_check=True)


def test_integer_kernels_run_where_they_were_promised(eight_bits, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # warns that the optimized model is for this processor
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(eight_bits[1], options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 6 and "Conv" not in kinds and "Gemm" not in kinds
    assert kinds.count("QLinearAdd") == 1  # the other sum has a product as operand, which is in float


class AnyRank(nn.Module):
    """Convolutions with one, two or three axes: strides, dilation, conv groups, padding modes, a transposed one in float."""

    def __init__(self, rank):
        super().__init__()
        convolution, transposed, norm, pool = (
            getattr(nn, f"{name}{rank}d") for name in ("Conv", "ConvTranspose", "BatchNorm", "AdaptiveAvgPool")
        )
        self.stem, self.stem_norm = convolution(3, 8, 3, padding=1, bias=False), norm(8)
        self.up, self.up_norm = transposed(8, 8, 2, stride=2, bias=False), norm(8)
        self.wide = convolution(8, 8, 3, padding=2, dilation=2, groups=2)
        self.depthwise = convolution(8, 8, 3, stride=2, padding=1, groups=8, padding_mode="replicate")
        self.circular = convolution(8, 8, 3, padding="same", padding_mode="circular")
        self.pool, self.head = pool(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.up_norm(self.up(F.relu(self.stem_norm(self.stem(x))))))
        x = F.relu(self.circular(F.relu(self.depthwise(F.relu(self.wide(x))))))
        return self.head(self.pool(x).flatten(1))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_every_rank_become_integers(rank, tmp_path):
    torch.manual_seed(0)
    shape, path = (3, 6, 5, 4)[: rank + 1], tmp_path / "model.onnx"
    model, images = AnyRank(rank), torch.randn(64, *shape)
    for norm in (model.stem_norm, model.up_norm):
        norm.momentum = None
    model.train()(images)
    graph = analyze(model.eval(), (images[:1],))
    dense = model, graph, images
    network = quantized(dense, {layer.name: (8, 8) for layer in graph.geometry.layers if layer.quantizable})
    executed = {layer.name: layer.executed for layer in export_onnx(network, graph, images, path)}
    assert executed.pop("up") == "float32" and list(executed.values()) == ["int8"] * 5
    stored = stored_weights(path)
    for name in executed:
        assert np.array_equal(stored[f"{name}.weight"][0], quantized_weight(network.get_submodule(name)).codes.numpy()), name
    difference, _ = compare(network, path, images)
    assert difference < CLOSE
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 4 and kinds.count("ConvTranspose") == 1 and "Conv" not in kinds


def test_large_networks_keep_their_weights_in_a_second_file(conv_net, eight_bits, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_ONE_FILE", 1000)
    onnx_export._save(onnx.load(eight_bits[1]), tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    images = images_like(conv_net, 20)
    assert np.array_equal(run(tmp_path / "model.onnx", images), run(eight_bits[1], images))


def test_linear_layers_on_tokens_become_integers(token_net, tmp_path):
    network, path = quantized(token_net, (8, 8)), tmp_path / "model.onnx"
    executed = export_onnx(network, token_net[1], token_net[2], path)
    assert {layer.name: layer.executed for layer in executed} == dict.fromkeys(("patches", "grow", "shrink", "head"), "int8")
    stored = [codes for codes, _ in stored_weights(path).values()]
    for name in ("grow", "shrink"):
        codes = quantized_weight(network.get_submodule(name)).codes.numpy()
        assert any(np.array_equal(codes.T, other) for other in stored), name
    difference, same = compare(network, path, images_like(token_net))
    assert difference < CLOSE and same > 0.9


def test_only_layers_with_bits_for_weight_and_input_become_integers(conv_net, tmp_path):
    """And of those, only the ones that the caller does not keep in float."""
    bits = {"stem": (4, 8), "depthwise": (8, 8), "project": (4, 32), "plain": (32, 8), "linear": (8, 8)}
    network, path = quantized(conv_net, bits), tmp_path / "model.onnx"
    in_float = {"stem": "It is faster so.", "plain": "It is faster so.", "squeeze": "It is faster so."}
    executed = {layer.name: layer for layer in export_onnx(network, conv_net[1], conv_net[2], path, in_float)}
    assert [name for name, layer in executed.items() if layer.executed == "int8"] == ["depthwise", "linear"]
    assert set(stored_weights(path)) == {"depthwise.weight", "linear.weight"}
    assert executed["stem"].note == "It is faster so."
    assert [name for name, layer in executed.items() if layer.kept_in_float] == ["stem"]
    assert "Only its weight" in executed["project"].note and "Only its input" in executed["plain"].note
    assert executed["squeeze"].note == ""
    assert (executed["project"].weight_bits, executed["project"].activation_bits) == (4, 32)
    difference, same = compare(network, path, images_like(conv_net))
    assert difference < CLOSE and same > 0.9


def test_a_network_kept_in_float_computes_with_the_rounded_weights(conv_net, tmp_path):
    """Without a rounded input, only the order of sums differs from the network with rounded weights."""
    weights_only, both = quantized(conv_net, (3, 32)), quantized(conv_net, (3, 8))
    in_float = {layer.name: "It is faster so." for layer in conv_net[1].geometry.layers}
    executed = export_onnx(both, conv_net[1], conv_net[2], tmp_path / "model.onnx", in_float)
    assert {(layer.executed, layer.kept_in_float) for layer in executed} == {("float32", True)}
    with torch.no_grad():
        expected = weights_only(conv_net[2]).numpy()
    assert np.abs(run(tmp_path / "model.onnx", conv_net[2]) - expected).max() < 1e-4


@pytest.mark.parametrize(("quantizer", "bits"), [("uniform", (4, 2)), ("power_of_two", (4, 3))])
def test_fewer_bits_are_stored_in_bytes_exactly(conv_net, tmp_path, quantizer, bits):
    names = [layer.name for layer in conv_net[1].geometry.layers]
    per_layer = {name: (bits[index % 2], 8) for index, name in enumerate(names)}
    network, path = quantized(conv_net, per_layer, quantizer), tmp_path / "model.onnx"
    norms = dict(conv_net[1].batch_norms)
    executed = export_onnx(network, conv_net[1], conv_net[2], path)
    assert all(layer.executed == "int8" and layer.note == "" for layer in executed)
    for name, (codes, scale) in stored_weights(path).items():
        name = name.removesuffix(".weight")
        weight = quantized_weight(network.get_submodule(name)).dequantize().numpy()
        gain = np.ones(len(weight), np.float32)
        if name in norms:
            norm = network.get_submodule(norms[name])
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        shape = (-1, *[1] * (weight.ndim - 1))
        assert np.allclose(codes * scale.reshape(shape), weight * gain.reshape(shape), rtol=1e-5, atol=1e-9), name
    difference, same = compare(network, path, images_like(conv_net))
    assert difference < CLOSE and same > 0.9


def test_powers_of_two_that_do_not_fit_a_byte_are_rounded_with_a_note(conv_net, tmp_path):
    network, path = quantized(conv_net, (6, 8), "power_of_two"), tmp_path / "model.onnx"
    executed = {layer.name: layer for layer in export_onnx(network, conv_net[1], conv_net[2], path)}
    assert "nearest of 255 levels" in executed["plain"].note
    difference, same = compare(network, path, images_like(conv_net))
    assert difference < CLOSE and same > 0.9


def test_inputs_of_fewer_bits_get_256_levels_over_the_same_range(conv_net, tmp_path):
    network, path = quantized(conv_net, (8, 4)), tmp_path / "model.onnx"
    executed = export_onnx(network, conv_net[1], conv_net[2], path)
    assert all("over the range of the 4-bit grid" in layer.note for layer in executed)
    finer = quantized(conv_net, (8, 8))
    with torch.no_grad():
        images = images_like(conv_net)
        coarse, fine, found = network(images).numpy(), finer(images).numpy(), run(path, images)
    assert np.abs(found - fine).mean() < np.abs(coarse - fine).mean()


def test_two_readers_of_a_tensor_share_the_wider_grid_and_a_note_says_so(tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = (nn.Conv2d(channels, 8, 3) for channels in (3, 8, 8))

        def forward(self, x):
            x = F.relu(self.stem(x))
            return (self.left(x) + self.right(x)).mean((2, 3))

    dense = made(Fork)
    network = quantized(dense, {"left": (8, 8), "right": (8, 2)})
    left, right = export_onnx(network, dense[1], dense[2], tmp_path / "model.onnx")[1:]
    notes = [note for note in (left.note, right.note) if "grid of layer" in note]
    assert left.executed == right.executed == "int8" and len(notes) == 1


def test_integer_weights_of_a_layer_that_is_called_twice_have_one_reader_each(tmp_path):
    """On processors without VNNI, ONNX Runtime cannot load files where an integer weight has several readers."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return self.shared(x).mean((2, 3)) + self.shared(F.max_pool2d(x, 2)).mean((2, 3))

    dense, path = made(Twice), tmp_path / "model.onnx"
    network = quantized(dense, (8, 8))
    assert [layer.executed for layer in export_onnx(network, dense[1], dense[2], path)] == ["int8", "int8"]
    readers = [name for node in onnx.load(path).graph.node for name in node.input]
    weights = stored_weights(path)
    assert len(weights) == 3 and all(readers.count(f"{name}_quantized") == 1 for name in weights)
    assert compare(network, path, images_like(dense))[0] < CLOSE


@pytest.mark.parametrize("name", QUANTIZERS)
def test_grids_of_asymmetric_inputs_are_in_the_file_exactly(tmp_path, name):
    """Without ReLUs and batch norms, inputs have both signs: scale and zero point are those of the network's own grids."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)

        def forward(self, x):
            return self.third(F.elu(self.second(self.first(x)))).mean((2, 3))

    dense, path = made(Plain), tmp_path / "model.onnx"
    network = quantized(dense, (8, 8), name)
    executed = export_onnx(network, dense[1], dense[2], path)
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in model.graph.node}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for node, layer, kept in zip(convolutions, ("first", "second", "third"), executed, strict=True):
        grid, given = activation_grid(network.get_submodule(layer)), nodes[node.input[0]]
        assert given.op_type == "DequantizeLinear" and kept.executed == "int8" and 0 < grid.zero_point < 255
        assert constants[given.input[1]] == np.float32(grid.scale) and constants[given.input[2]] == grid.zero_point
    assert compare(network, path, images_like(dense))[0] < CLOSE


def test_a_channel_with_tiny_weights_beside_its_bias_stays_finite():
    """Its bias in units of both scales would not fit int32, so its scale grows and its codes become zero."""
    layer = nn.Linear(4, 3)
    layer.bias.data = torch.tensor([50.0, -50.0, 1.0])
    codes = torch.full((3, 4), 100, dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.tensor([1e-20, 0.0, 0.01]), 8)
    made = onnx_export._integer_layer(weight, None, layer, ActivationGrid(0.02, 3, 8))
    assert made.codes.tolist() == [[0] * 4, [0] * 4, [100] * 4]
    assert (made.scale > 0).all() and made.scale[2] == np.float32(0.01)
    assert (np.abs([50, -50, 1]) / (made.scale * 0.02) <= 2**30).all()


def test_a_weight_that_is_a_bare_parameter_is_exported(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.linear = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(F.relu(F.conv2d(x, self.kernel)).mean((2, 3)))

    dense, path = made(Bare), tmp_path / "model.onnx"
    network = quantized(dense, {"linear": (8, 8)})
    executed = export_onnx(network, dense[1], dense[2], path)
    assert [(layer.name, layer.executed) for layer in executed] == [("kernel", "float32"), ("linear", "int8")]
    assert compare(network, path, images_like(dense))[0] < CLOSE


def test_a_forward_with_any_number_of_inputs_is_exported(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

        def forward(self, *inputs, **options):
            return self.module(*inputs, **options)

    for network in (Wrapped().eval(), nn.DataParallel(Wrapped().module).eval()):
        path, images = tmp_path / "model.onnx", torch.randn(3, *SHAPE)
        graph = analyze(network, (images,))
        export_onnx(network, graph, images, path)
        np.testing.assert_allclose(run(path, images), network(images).detach().numpy(), atol=1e-5)


def test_what_torch_cannot_export_is_one_sentence(tmp_path):
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(torch.special.bessel_j0(x).mean((2, 3)))

    network, graph, images = made(Unknown)
    with pytest.raises(InputError, match="torch.onnx cannot export this network: .*bessel_j0") as raised:
        export_onnx(network, graph, images, tmp_path / "model.onnx")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    assert list(tmp_path.iterdir()) == []
