"""Image sizes in exported files: free where the network allows it, and then the same outputs as in PyTorch at every size."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from secateur.envs.inputs import Arguments
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import masked_model, slice_model
from secateur.envs.tasks.unet import unet
from secateur.search.export.image_size import size_sentence, tensor_shapes
from secateur.search.export.onnx_export import export_onnx
from secateur.search.export.write import _write_pt2
from secateur.search.profiling.runtimes import open_session
from tests.search.export.test_onnx_export import quantized


class Segmenter(nn.Module):
    """A backbone, torchvision's FCN head, and its enlargement to the size of the image."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
        self.head = FCNHead(32, 5)

    def forward(self, x):
        scores = self.head(self.backbone(x))
        return {"out": F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class OneSize(nn.Module):
    """Its positions have learned offsets, so it runs at one size only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.offsets = nn.Parameter(torch.randn(1, 1, 16, 16))

    def forward(self, x):
        return self.second(torch.relu(self.first(x + self.offsets)))


class Baked(OneSize):
    """It runs at any size, but a size becomes a number when it is traced: outputs of another size would be wrong."""

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * torch.tensor(float(np.sqrt(int(x.shape[2]))))


class Classifier(OneSize):
    def forward(self, x):
        return self.second(torch.relu(self.first(x))).mean((2, 3))


def seeded(make, shape):
    torch.manual_seed(0)
    network = make().eval()
    return network, torch.randn(16, *shape)


def exported(network, images, path):
    """The shapes in the file of a network, and a session that runs it."""
    example = images.tensors if isinstance(images, Arguments) else (images,)
    export_onnx(network, analyze(network, tuple(x[:1] for x in example)), images, path)
    onnx.checker.check_model(path, full_check=True)
    return tensor_shapes(path), open_session(path)


@torch.no_grad()
def outputs_of(network, *inputs):
    outputs = network(*inputs)
    return (outputs["out"] if isinstance(outputs, dict) else outputs).numpy()


@pytest.mark.parametrize(
    ("make", "shape", "free", "sizes"),
    [
        (lambda: unet((8, 12, 16)), (1, 32, 32), ["8*h", "8*w"], [(32, 32), (64, 40), (24, 96)]),
        (Segmenter, (3, 32, 32), ["height", "width"], [(32, 32), (48, 80), (37, 51)]),
    ],
    ids=["unet", "fcn"],
)
def test_a_compressed_network_and_its_file_agree_at_three_sizes(make, shape, free, sizes, tmp_path):
    dense, images = seeded(make, shape)
    graph = analyze(dense, (images[:1],))
    kept = [np.sort(np.random.default_rng(0).permutation(group.units)[: max(1, group.units // 2)]) for group in graph.groups]
    assert graph.groups, "something is pruned"
    small = slice_model(dense, graph, kept)
    shapes, session = exported(small, images, tmp_path / "model.onnx")
    assert shapes["inputs"] == [{"name": "input", "shape": ["batch", shape[0], *free]}]
    masked = masked_model(dense, graph, kept)
    for height, width in sizes:
        batch = torch.randn(2, shape[0], height, width)
        expected = outputs_of(small, batch)
        assert expected.shape[-2:] == (height, width)
        # The groups hold at every size: the sliced network is the dense one with zeros in the removed channels.
        np.testing.assert_allclose(expected, outputs_of(masked, batch), atol=1e-4)
        np.testing.assert_allclose(session.run(batch.numpy())[0], expected, atol=1e-4)


def test_eight_bits_hold_at_other_sizes(tmp_path):
    network, images = seeded(lambda: unet((8, 12, 16)), (1, 32, 32))
    graph = analyze(network, (images[:1],))
    small = quantized((network, graph, images), (8, 8))
    executed = export_onnx(small, graph, images, tmp_path / "model.onnx")
    assert {layer.executed for layer in executed} == {"int8"}
    session = open_session(tmp_path / "model.onnx")
    for size in ((32, 32), (64, 40)):
        batch = torch.randn(2, 1, *size)
        expected = outputs_of(small, batch)
        assert np.abs(session.run(batch.numpy())[0] - expected).mean() < 0.1 * expected.std()


@pytest.mark.parametrize("make", [OneSize, Baked])
def test_a_size_that_cannot_be_free_stays_fixed(make, tmp_path):
    network, images = seeded(make, (1, 16, 16))
    shapes, session = exported(network, images, tmp_path / "model.onnx")
    assert shapes["inputs"][0]["shape"] == ["batch", 1, 16, 16]
    np.testing.assert_allclose(session.run(images.numpy())[0], outputs_of(network, images), atol=1e-4)
    assert "images of 16 x 16 only" in size_sentence(shapes)


def test_networks_that_give_one_vector_per_image_keep_their_size(tmp_path):
    shapes, _ = exported(*seeded(Classifier, (1, 16, 16)), tmp_path / "model.onnx")
    assert shapes["inputs"][0]["shape"] == ["batch", 1, 16, 16] and size_sentence(shapes) == ""


def test_sentences_say_which_sizes(tmp_path):
    def shapes(*size):
        return {"inputs": [{"shape": ["batch", 5]}, {"shape": ["batch", 1, *size]}], "outputs": [{"shape": ["batch", 2, *size]}]}

    assert size_sentence(shapes("height", "width")) == "Height and width are free."
    assert size_sentence(shapes("8*h", "8*w")) == "Height and width are free, in multiples of 8."


class TwoImages(nn.Module):
    """An image and a vector; a second image of its own size."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.vector = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(2, 8, 3), nn.Linear(5, 8)

    def forward(self, image, vector, other):
        pooled = self.second(other).mean((2, 3)) + self.vector(vector)
        return self.first(image) + pooled[..., None, None]


def test_several_inputs_have_sizes_of_their_own(tmp_path):
    network, images = seeded(TwoImages, (1, 16, 16))
    inputs = Arguments((images, torch.randn(16, 5), torch.randn(16, 2, 9, 7)))
    shapes, session = exported(network, inputs, tmp_path / "model.onnx")
    assert [entry["shape"][1:] for entry in shapes["inputs"]] == [[1, "height", "width"], [5], [2, "height2", "width2"]]
    other = [torch.randn(3, 1, 20, 12), torch.randn(3, 5), torch.randn(3, 2, 11, 30)]
    np.testing.assert_allclose(session.run(*(x.numpy() for x in other))[0], outputs_of(network, *other), atol=1e-4)


def test_the_program_of_torch_export_takes_other_sizes(tmp_path):
    network, images = seeded(Segmenter, (3, 32, 32))
    _write_pt2(network, images, tmp_path / "model.pt2")
    program, batch = torch.export.load(tmp_path / "model.pt2").module(), torch.randn(3, 3, 48, 80)
    np.testing.assert_allclose(outputs_of(program, batch), outputs_of(network, batch), atol=1e-5)
