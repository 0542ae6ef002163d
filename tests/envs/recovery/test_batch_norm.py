"""Recalibrated statistics are the plain average over the images, and modules keep their modes."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from secateur.envs.core import InputError
from secateur.envs.recovery.batch_norm import BatchNorm, BatchNormConfig


@dataclass
class Bare:
    """As much of a candidate as recalibration uses."""

    network: nn.Module
    images: torch.Tensor | None
    dtype: torch.dtype = torch.float32
    parts: int = 1

    @property
    def layers(self) -> dict[str, nn.Module]:
        return dict(self.network.named_modules())

    def given_images(self) -> torch.Tensor:
        return self.images


def test_statistics_are_the_plain_average_over_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)).eval()
    images = 3 * torch.randn(90, 3, 8, 8) + 1
    BatchNorm(BatchNormConfig(batch_size=40, max_images=80)).apply(Bare(model, images))
    outputs = model[0](images[:80])
    assert torch.allclose(model[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model[1].running_var, outputs.var((0, 2, 3)), rtol=1e-2)
    assert model[1].momentum == 0.3 and not model[1].training and int(model[1].num_batches_tracked) == 2


def test_modes_are_restored_when_the_model_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(RuntimeError):
        BatchNorm().apply(Bare(model, torch.zeros(8, 5, 8, 8)))
    assert model[1].momentum == 0.1 and not model[1].training


def test_network_without_batch_norm_is_left_alone():
    network = nn.Sequential(nn.Linear(3, 2))
    before = [tensor.clone() for tensor in network.parameters()]
    BatchNorm().apply(Bare(network, None))  # without a single image
    assert all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("option", ["batch_size", "max_images"])
def test_options_out_of_range_are_input_errors(option):
    with pytest.raises(InputError, match=option):
        BatchNormConfig(**{option: 1})
