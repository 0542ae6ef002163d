"""The CIFAR networks of the pruning literature, with the tensor names of the published weights.

Source: He et al. 2016, arXiv:1512.03385, section 4.2 (ResNets with parameter-free shortcuts, "option A");
Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D with batch norm and one linear layer,
as is usual for 32x32 images. The tensor names are those of github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

VGG16_WIDTHS = (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512, None)
"""Output channels of each convolution; None is a 2x2 max pooling."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which only subsamples and pads with zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + residual)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels on 32x32 images; the depth is 6n + 2."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """Return the untrained ResNet-20, 3x32x32 -> `num_classes`."""
    return CifarResNet(20, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """Return the untrained ResNet-32, 3x32x32 -> `num_classes`."""
    return CifarResNet(32, num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """Return the untrained ResNet-44, 3x32x32 -> `num_classes`."""
    return CifarResNet(44, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """Return the untrained ResNet-56, 3x32x32 -> `num_classes`."""
    return CifarResNet(56, num_classes)


def resnet110(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(110, num_classes)


def vgg16_bn(num_classes: int = 10) -> nn.Sequential:
    """Return VGG-16 with batch norm for 32x32 images; the names of its tensors are "0.<layer>.…" and "2.…"."""
    layers: list[nn.Module] = []
    in_channels = 3
    for width in VGG16_WIDTHS:
        if width is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        in_channels = width
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(in_channels, num_classes))
