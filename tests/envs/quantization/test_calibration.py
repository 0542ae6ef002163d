"""Ranges are those of each layer's input."""

import numpy as np
import pytest
import torch
from torch import nn

from envs.core import InputError
from envs.quantization.calibration import calibrate_activations


class Twice(nn.Module):
    """Calls one linear layer twice, the second time on what the first made."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.unused = nn.Linear(2, 2)
        nn.init.constant_(self.linear.weight, -2.0)

    def forward(self, x):
        return self.linear(self.linear(x))


def test_range_covers_all_calls_and_batches():
    images = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.5, 0.5]])
    # Outputs of the first call: -6, 2 and -2.
    assert calibrate_activations(Twice(), ["linear"], images, batch_size=2) == {"linear": (-6.0, 2.0)}


def test_percentile_leaves_out_the_tails():
    model = nn.Sequential(nn.Linear(1, 1))
    values = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    values[7] = 1000.0
    low, high = calibrate_activations(model, ["0"], values, percentile=99.0)["0"]
    expected = np.percentile(values.numpy(), [1, 99])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.05)
    assert calibrate_activations(model, ["0"], values)["0"][1] == 1000.0


def test_hooks_are_removed_even_when_the_model_fails():
    model = Twice()
    with pytest.raises(RuntimeError):
        calibrate_activations(model, ["linear"], torch.zeros(2, 5))
    assert not model.linear._forward_pre_hooks


def test_layers_without_a_finite_range_are_input_errors():
    with pytest.raises(InputError, match="`unused`"):
        calibrate_activations(Twice(), ["unused"], torch.zeros(2, 2))
    with pytest.raises(InputError, match="`linear`"):
        calibrate_activations(Twice(), ["linear"], torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(InputError, match="percentile"):
        calibrate_activations(Twice(), ["linear"], torch.zeros(2, 2), percentile=0.999)
