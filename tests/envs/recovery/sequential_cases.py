"""Networks with every kind of sum, and their compression, for the tests of the refits in sequence."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers.uniform import Uniform


def with_statistics(model, seed=0):
    """Return the model in eval mode with strong weights and random batch norms, as a trained network has them."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=rng)
    return model.eval()


class Residual(nn.Module):
    """Two blocks on a stream; activations and sums in place, as torchvision writes them."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        for block in "ab":
            setattr(self, f"{block}1", nn.Conv2d(8, 16, 3, padding=1, bias=False))
            setattr(self, f"{block}1_norm", nn.BatchNorm2d(16))
            setattr(self, f"{block}2", nn.Conv2d(16, 8, 3, padding=1, bias=False))
            setattr(self, f"{block}2_norm", nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def block(self, name, x):
        y = F.relu(getattr(self, f"{name}1_norm")(getattr(self, f"{name}1")(x)), inplace=self.in_place)
        y = getattr(self, f"{name}2_norm")(getattr(self, f"{name}2")(y))
        if self.in_place:
            y += x
        else:
            y = x + y
        return F.relu(y, inplace=self.in_place)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)), inplace=self.in_place)
        return self.head(self.block("b", self.block("a", x)).mean((2, 3)))


class Shortcut(nn.Module):
    """A convolution on the shortcut that runs after the branch."""

    def __init__(self):
        super().__init__()
        self.branch, self.branch_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch2 = nn.Conv2d(8, 6, 3, padding=1)
        self.side = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        y = self.branch2(F.relu(self.branch_norm(self.branch(x))))
        return self.last(F.relu(y + self.side(x))).flatten(1)


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, squeeze-and-excitation, linear layers on tokens and flattened."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.expand_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.depthwise_norm = nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 12, 3, stride=2, padding=1, dilation=1, groups=2)
        self.side = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.join = nn.Conv2d(18, 10, 1)
        self.token1, self.token2 = nn.Linear(10, 20), nn.Linear(20, 10)
        self.hidden, self.head = nn.Linear(10 * 16, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu6(self.depthwise_norm(self.depthwise(F.relu6(self.expand_norm(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = torch.cat([self.grouped(y), self.side(x)], 1)
        tokens = F.relu(self.join(F.relu(y))).flatten(2).transpose(1, 2)
        tokens = tokens + self.token2(F.gelu(self.token1(tokens)))
        return self.head(F.relu(self.hidden(tokens.flatten(1))))


_PROBLEMS = {}
"""Graph and calibration by the identities of model and images, which are kept alive: analysis takes seconds."""


def problem(model, images, recoveries, quantizer=None, scores=None):
    """Return an assembler; without `scores`, units are removed in a random order."""
    key = id(model), id(images)
    if key not in _PROBLEMS:
        graph = analyze(model, (images[:1],))
        _PROBLEMS[key] = model, images, graph, calibrate(model, graph, images, CalibrationConfig())
    *_, graph, calibration = _PROBLEMS[key]
    rng = np.random.default_rng(0)
    scores = scores or tuple(rng.permutation(group.units).astype(float) for group in graph.groups)
    return Assembler(model, graph, scores, quantizer or Uniform(), recoveries, calibration, images)


def policy(assembler, share=0.5, names=None, bits=(32, 32)):
    """Keep a share of all groups, or of the named ones."""
    groups, layers = assembler.graph.groups, len(assembler.graph.geometry.layers)
    widths = [max(1, round(share * g.units)) if names is None or g.name in names else g.units for g in groups]
    return CompressionPolicy(tuple(widths), (bits[0],) * layers, (bits[1],) * layers)


def pictures(count=96, size=8, seed=0):
    """Return smooth random images: neighboring pixels have nearly the same values, as in photographs."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, -(-size // 2), -(-size // 2), generator=rng)
    return F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size, generator=rng)


def error(network, model, images):
    """Return the mean squared difference of the outputs, relative to their variance over the images."""
    with torch.no_grad():
        dense = model(images)
        return float((network(images) - dense).square().mean() / dense.var(0).mean())


def recovered(model, images, *recoveries, names=None, share=0.5, bits=(32, 32), quantizer=None):
    """Return the compressed network."""
    assembler = problem(model, images, recoveries, quantizer)
    return assembler.assemble(policy(assembler, share, names, bits))


INNER = ("a1", "b1")
