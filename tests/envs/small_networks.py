"""Small networks of torchvision's families: every way in which their layers are joined, a thousandth of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.googlenet import Inception
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import make_layers

from secateur.envs.model_graph import ModelGraph, analyze

SIZE, CLASSES = 32, 5


def _mobilenet() -> nn.Module:
    """Return depthwise convolutions with squeeze-and-excitation."""
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 5, 32, 24, True, "HS", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 48, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, 32, num_classes=CLASSES)


def _googlenet() -> nn.Module:
    """Return parallel branches whose outputs are concatenated."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    branches = Inception(8, 6, 4, 8, 4, 6, 4), Inception(24, 6, 4, 8, 4, 6, 4)
    return nn.Sequential(stem, *branches, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


def _vgg() -> nn.Module:
    """Return a chain with a flatten that spreads a channel over four features."""
    layers = make_layers([8, "M", 12, "M", 16, "M"], batch_norm=True)
    head = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


SMALL_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": _mobilenet,
    "densenet": lambda: models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES),
    "regnet": lambda: models.RegNet(BlockParams.from_init_params(3, 16, 8.0, 2.0, 8, 0.25), num_classes=CLASSES),
    "shufflenet": lambda: models.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 40], num_classes=CLASSES),
    "googlenet": _googlenet,
    "vgg": _vgg,
    "convnext": lambda: ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], num_classes=CLASSES),
    "swin": lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=CLASSES),
    "vit": lambda: models.VisionTransformer(SIZE, 8, 2, 2, 16, 24, num_classes=CLASSES),
}


@dataclass(frozen=True)
class SmallNetwork:
    """A network with random weights in eval mode, its plan (not verified by trying), and the size of its images."""

    name: str
    model: nn.Module
    graph: ModelGraph
    size: int = SIZE


@cache
def small_network(name: str) -> SmallNetwork:
    """Return the small network of a family, the same object each time."""
    torch.manual_seed(0)
    model = randomize(SMALL_NETWORKS[name]())
    # The verification finds the sizes of views in the attention of Swin; the others need none.
    return SmallNetwork(name, model, analyze(model, (torch.zeros(1, 3, SIZE, SIZE),), verify=name == "swin"))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return the model in eval mode with strong weights and random norms and scales, as a trained network has them."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.weight.uniform_(0.5, 1.5, generator=rng)
            module.bias.normal_(0, 0.3, generator=rng)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=rng)
            module.running_var.uniform_(0.5, 1.5, generator=rng)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.5, 1.5, generator=rng)
    return model.eval()
