"""A small network with every kind of layer that profiles know."""

import pytest
import torch
from torch import nn

from secateur.envs.model_graph import analyze
from secateur.search.profiling.profiler import Subject


class SmallNet(nn.Module):
    """Convolution, residual sum, depthwise and pointwise convolution, linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.hidden = nn.Linear(32, 24)
        self.classes = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.outer(self.inner(x)))
        x = self.pointwise(self.depthwise(x)).mean((2, 3))
        return self.classes(torch.relu(self.hidden(x)))


@pytest.fixture(scope="session")
def subject() -> Subject:
    """`SmallNet` with random weights, analysed."""
    torch.manual_seed(0)
    network = SmallNet().eval()
    return Subject("small", network, analyze(network, (torch.zeros(1, 3, 12, 12),)), (3, 12, 12))
