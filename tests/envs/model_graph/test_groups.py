"""The plan: groups against an independent library, known totals, memory by hand, exclusion, and an untouched model."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import slice_model
from tests.envs.small_networks import SMALL_NETWORKS


def image_of(size):
    return (torch.zeros(1, 3, size, size),)


def total_macs(graph):
    shapes = graph.geometry.shapes()
    return shapes.weights[0] @ [layer.macs_per_weight for layer in graph.geometry.layers] + graph.geometry.shapes().other_macs[0]


def total_parameters(graph):
    shapes = graph.geometry.shapes()
    biases = shapes.out_channels[0] @ [layer.has_bias for layer in graph.geometry.layers]
    return shapes.weights[0].sum() + biases + shapes.other_parameters[0]


@pytest.mark.parametrize("make", [torchvision.models.resnet18, SMALL_NETWORKS["vgg"]], ids=["resnet", "vgg"])
@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_finds_the_same_groups(make):
    import torch_pruning  # slow to import

    model = make().eval()
    graph = analyze(model, image_of(64), verify=False)
    dependencies = torch_pruning.DependencyGraph().build_dependency(model, image_of(64)[0])
    names = {module: path for path, module in model.named_modules()}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    theirs = set()
    for group in dependencies.get_all_groups(ignored_layers=[last]):
        cut = [d.dep.target.module for d in group if "out_channels" in d.dep.handler.__name__]
        theirs.add(frozenset(names[module] for module in cut if isinstance(module, (nn.Conv2d, nn.Linear))))
    assert {frozenset(group.producers) for group in graph.groups} == theirs


@pytest.mark.parametrize(("name", "giga_macs"), [("resnet18", 1.814), ("mobilenet_v2", 0.301), ("vgg16", 15.470)])
def test_totals_of_published_networks(name, giga_macs):
    arguments = {"init_weights": False} if name == "vgg16" else {}  # 138 M random numbers take a second
    model = torchvision.models.get_model(name, **arguments)
    graph = analyze(model, image_of(224), verify=False)
    assert total_macs(graph) == pytest.approx(giga_macs * 1e9, rel=1e-3)
    assert total_parameters(graph) == sum(p.numel() for p in model.parameters())


def test_attention_products_and_outside_parameters_are_counted():
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
    )
    graph = analyze(model, image_of(32), verify=False)
    tokens = 4 * 4 + 1
    assert graph.geometry.shapes().other_macs[0] == 2 * tokens * tokens * 16
    assert total_parameters(graph) == sum(p.numel() for p in model.parameters())
    kinds = {layer.name.removeprefix("encoder.layers.encoder_layer_0."): layer for layer in graph.geometry.layers}
    assert kinds["mlp.0"].quantizable and kinds["mlp.0"].out_hw == (tokens, 1)
    assert not kinds["self_attention.in_proj"].quantizable


class Block(nn.Module):
    """Two convolutions and a residual: the input of the block must be held until the addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.outer(F.relu(self.norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def test_memory_holds_residuals_and_works_in_place():
    graph = analyze(Block(), image_of(4))
    geometry = graph.geometry
    # image, stem (+ relu), inner (+ norm + relu), outer (+ addition), mean, head
    np.testing.assert_array_equal(geometry.shapes().buffer_bytes[0] / 4, [48, 128, 64, 128, 8, 5])
    assert geometry.buffer_readers == ((0,), (), (2,), (), (3,), ())
    live = {int(layer): set(np.flatnonzero(row)) for row, layer in zip(geometry.live, geometry.step_layer, strict=True)}
    assert (live[0], live[1], live[2]) == ({0, 1}, {1, 2}, {1, 2, 3})
    assert graph.batch_norms == (("inner", "norm"),)
    narrow = geometry.shapes(np.where([g.name == "inner" for g in graph.groups], 1, geometry.group_units))
    assert narrow.buffer_bytes[0, 2] == 4 * 16


def test_views_share_memory_and_copies_do_not():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.head(x.contiguous())

    geometry = analyze(Views(), image_of(4)).geometry
    np.testing.assert_array_equal(geometry.shapes().buffer_bytes[0] / 4, [48, 128, 128, 80])


def test_a_layer_called_twice_counts_twice_and_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.conv(F.avg_pool2d(self.conv(self.stem(x)), 2))

    (stem, conv) = analyze(Twice(), image_of(4)).geometry.layers
    assert (stem.calls, conv.macs_per_weight) == (1, 16 + 4)


def test_layers_inside_no_grad_and_autocast_regions_are_seen():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.exact, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            with torch.no_grad():
                x = self.frozen(x)
            with torch.autocast("cpu", enabled=False):
                x = self.exact(x)
            return self.head(x.mean((2, 3)))

    graph = analyze(Regions(), image_of(4))
    assert [layer.name for layer in graph.geometry.layers] == ["frozen", "exact", "head"]
    assert [(g.name, g.units) for g in graph.groups] == [("frozen", 8), ("exact", 6)]


def test_excluded_layers_stay_and_unknown_patterns_are_refused():
    model = Block()
    graph = analyze(model, image_of(4), exclude=["inn*"])
    assert [g.name for g in graph.groups] == ["stem"]
    assert {f.layer: f.reason for f in graph.frozen} == {"inner": "excluded by the config", "head": "model output"}
    with pytest.raises(InputError, match="'layer9.\\*', but no layer matches"):
        analyze(model, image_of(4), exclude=["layer9.*"])


def test_names_units_and_order_of_groups():
    graph = analyze(torchvision.models.resnet18(), image_of(64), verify=False)
    assert graph.geometry.group_names == tuple(g.name for g in graph.groups)
    order = [layer.name for layer in graph.geometry.layers]
    firsts = [order.index(g.producers[0]) for g in graph.groups]
    assert firsts == sorted(firsts) and [g.name for g in graph.groups] == [order[i] for i in firsts]
    assert graph.geometry.group_units.tolist() == [g.units for g in graph.groups]


def test_two_groups_of_one_layer_have_two_names():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head((self.wide(x) + torch.cat([self.narrow(x), self.other(x)], 1)).mean((2, 3)))

    graph = analyze(Part(), image_of(4))
    assert [(g.name, g.units, g.producers) for g in graph.groups] == [
        ("wide", 4, ("wide", "narrow")),
        ("wide#2", 4, ("wide", "other")),
    ]


def test_the_model_is_left_alone_and_the_plan_travels():
    model = Block().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = analyze(model, image_of(4))
    assert model.training and not model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert pickle.loads(pickle.dumps(graph)).geometry.group_names == graph.geometry.group_names
    assert graph.seconds > 0


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("nij,njk->nik", [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        ("...ij,...jk->...ik", [(2, 7, 3, 4), (2, 7, 4, 5)], 2 * 7 * 3 * 4 * 5),
        ("b...j,jk->b...k", [(2, 7, 6, 4), (4, 5)], 2 * 7 * 6 * 4 * 5),
        ("...ij,...jk->...ik", [(7, 3, 4), (1, 4, 5)], 7 * 3 * 4 * 5),
        ("...ij,...ik->...jk", [(8, 16, 16), (8, 16, 16)], 32_768),
    ],
)
def test_products_of_einsum_are_counted(equation, shapes, macs):
    class Product(nn.Module):
        def forward(self, x):
            first, second = (torch.ones(shape) for shape in shapes)
            return torch.einsum(equation, first * x.mean(), second)

    geometry = analyze(Product(), (torch.ones(1, 2),), verify=False).geometry
    assert geometry.shapes().other_macs[0] == macs


def test_layers_of_bare_parameters_have_names_of_their_own():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.conv = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Conv2d(4, 6, 1)
            self.conv_weight, self.mix_weight = nn.Parameter(torch.randn(5, 6, 1, 1)), nn.Parameter(torch.randn(5, 5))

        def forward(self, x):
            x = F.conv2d(self.conv(F.conv2d(x, self.weight)), self.conv_weight)
            return F.linear(x.mean((2, 3)), self.mix_weight)

    graph = analyze(Bare(), image_of(4))
    assert [layer.name for layer in graph.geometry.layers] == ["weight", "conv", "conv_weight", "mix"]
    assert [group.name for group in graph.groups] == ["weight", "conv", "conv_weight"]


@pytest.mark.parametrize("second_bias", [False, True])
def test_a_shared_weight_with_two_biases_is_one_layer_and_all_biases_are_pruned(second_bias):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=second_bias)
            self.c.weight, self.head = self.b.weight, nn.Linear(8, 5)

        def forward(self, x):
            return self.head(F.relu(self.c(F.relu(self.b(self.a(x))))).mean((2, 3)))

    model = Tied()
    graph = analyze(model, image_of(4))
    (group,) = graph.groups
    biases = {s.tensor for s in group.slices if s.tensor.endswith("bias")}
    assert biases == {"a.bias", "b.bias", *(["c.bias"] if second_bias else [])}
    assert [layer.name for layer in graph.geometry.layers] == ["a", "b", "head"]
    assert total_parameters(graph) == sum(p.numel() for p in model.parameters())
    sliced = slice_model(model, graph, [np.arange(5)])
    shapes = graph.geometry.shapes([[5]])
    biases_left = shapes.out_channels[0] @ [layer.has_bias for layer in graph.geometry.layers]
    assert shapes.weights[0].sum() + biases_left + shapes.other_parameters[0] == sum(p.numel() for p in sliced.parameters())
