"""Which device computes, how things get there, and that the stand-in for a second device refuses what a GPU refuses."""

import pytest
import torch
from torch import nn

from secateur.cost_models.core import InputError
from secateur.envs.devices import CPU, called_from_anywhere, find_device, move, move_network, move_tree
from tests.other_device import DEVICE, MixedDevicesError, OtherDevice


def test_without_a_gpu_auto_is_the_cpu_and_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"`compute.device: {name}` asks for a GPU, but PyTorch finds none"):
            find_device(name)


def test_a_gpu_computes_float32_without_tf32(monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    request.addfinalizer(lambda: (setattr(matmul, "allow_tf32", before[0]), setattr(cudnn, "allow_tf32", before[1])))
    assert find_device("cpu") == CPU and torch.backends.cudnn.allow_tf32
    assert find_device("auto") == find_device("cuda") == torch.device("cuda:0")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(InputError, match="`compute.device: cuda:2` is not there: this machine has 2 GPUs, cuda:0 to cuda:1"):
        find_device("cuda:2")


def test_what_is_on_the_device_is_not_copied():
    network, x = nn.Linear(2, 2), torch.ones(2)
    assert move_network(network, CPU) is network and move(x, CPU) is x
    with OtherDevice():
        moved = move_network(network, DEVICE)
        assert moved is not network and move_network(moved, DEVICE) is moved
        assert moved.weight.device == DEVICE and network.weight.device == CPU
        there = move_tree({"x": [x, 3]}, DEVICE)
        assert there["x"][0].device == DEVICE and there["x"][1] == 3 and x.device == CPU


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x, wrong=False):
        return {"doubled": x * self.scale[:, None] if wrong else x * self.scale, "constant": 1}


def test_a_network_on_a_device_can_be_called_from_anywhere():
    with OtherDevice():
        network, x = move_network(Doubled(), DEVICE), torch.ones(4, 3)
        with pytest.raises(MixedDevicesError):
            network(x)
        with called_from_anywhere(network, DEVICE):
            assert network(x)["doubled"].device == CPU and network(x=x)["doubled"].sum() == 24
            with pytest.raises(RuntimeError):
                network(x, wrong=True)
            assert network(move(x, DEVICE))["doubled"].device == DEVICE and network(x)["constant"] == 1
        with pytest.raises(MixedDevicesError):
            network(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda x: x[torch.arange(2)],
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: nn.functional.linear(x, torch.ones(2, 3)),
        lambda x: x.numpy(),
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
        lambda x: x.add_(torch.ones(3)),
        lambda x: x.view(1, 3) @ torch.ones(3, 1),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(operation):
    with OtherDevice():
        with pytest.raises(MixedDevicesError):
            operation(torch.ones(3).to(DEVICE))


def test_the_stand_in_follows_tensors_as_a_gpu_does():
    with OtherDevice() as device:
        x = torch.ones(3, device=DEVICE)
        parameter = nn.Parameter(x)
        (parameter * 2 + torch.tensor(1.0)).sum().backward()
        made = [x + 1, x[1:], x.new_zeros(2), torch.zeros_like(x), parameter, parameter.grad, parameter.data, x.double(), x.to(x)]
        assert all(tensor.device == DEVICE for tensor in made)
        assert all(tensor.device == CPU for tensor in (x.cpu(), x.to("cpu"), torch.zeros(3), torch.from_numpy(x.cpu().numpy())))
        x.cpu().zero_()
        assert x.sum() == 3 and device.operations > 0
