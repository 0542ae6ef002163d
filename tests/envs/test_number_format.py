"""Networks are converted without touching anybody else's tensors; recalibration may use the converted ones."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.envs.number_format import convert_network, prepare_images
from secateur.envs.recovery.batch_norm import BatchNorm, BatchNormConfig


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)
        )
        self.eval()


def images(count=64):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_conversion_makes_new_tensors_and_keeps_ties():
    network = Net()
    network[3].tied = network[0].weight
    before = copy.deepcopy(network.state_dict())
    other = nn.Conv2d(3, 8, 3)
    other.weight = network[0].weight
    convert_network(network, torch.bfloat16, keep=(network[1],))
    assert network[0].weight.dtype == torch.bfloat16 and network[3].tied is network[0].weight
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].running_mean.dtype == network[1].weight.dtype == torch.float32
    assert network[4].running_var.dtype == torch.bfloat16 and network[4].num_batches_tracked.dtype == torch.int64
    assert other.weight.dtype == torch.float32 and torch.equal(other.weight, before["0.weight"])


def test_tokens_have_no_channels_last():
    assert prepare_images(torch.zeros(2, 5, 8), torch.bfloat16).shape == (2, 5, 8)


def recalibrated(dtype, config=None):
    network = Net()
    candidate = SimpleNamespace(network=network, layers=dict(network.named_modules()), given_images=images, dtype=dtype, parts=1)
    BatchNorm(config or BatchNormConfig(batch_size=32)).apply(candidate)
    return network


def test_statistics_are_those_of_the_plain_way():
    expected = Net()
    for norm in (expected[1], expected[4]):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in images().split(32):
            expected(batch)
    found = recalibrated(torch.float32)
    for index in (1, 4):
        assert torch.allclose(found[index].running_mean, expected[index].running_mean, atol=1e-5)
        assert torch.allclose(found[index].running_var, expected[index].running_var, rtol=1e-4)
        assert found[index].num_batches_tracked == 2 and found[index].momentum == 0.1 and not found[index].training
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())


def test_another_number_format_changes_little_and_only_statistics():
    exact, fast, dense = recalibrated(torch.float32), recalibrated(torch.bfloat16), Net()
    for name, tensor in fast.state_dict().items():
        assert tensor.dtype == exact.state_dict()[name].dtype
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, dense.state_dict()[name])
    for index in (1, 4):
        spread = exact[index].running_var.sqrt()
        assert ((fast[index].running_mean - exact[index].running_mean) / spread).abs().max() < 0.01
        assert (fast[index].running_var / exact[index].running_var - 1).abs().max() < 0.02


def test_statistics_kept_in_float32_are_finer_than_bfloat16():
    fast = recalibrated(torch.bfloat16)
    assert any(not torch.equal(norm.running_mean, norm.running_mean.bfloat16().float()) for norm in (fast[1], fast[4]))


@pytest.mark.parametrize("count", [1, 64])
def test_a_network_without_batch_norms_is_left_alone(count):
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    weight = network[0].weight
    candidate = SimpleNamespace(
        network=network, layers=dict(network.named_modules()), given_images=lambda: images(count), dtype=torch.bfloat16, parts=1
    )
    BatchNorm().apply(candidate)
    assert network[0].weight is weight
