"""The CIFAR networks have the published sizes; weights saved in float16 fill them in float32."""

import pytest
import torch

from secateur.envs.tasks import cifar_resnet
from secateur.envs.tasks.models import load_model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet20", 269_722), ("resnet32", 464_154), ("resnet44", 658_586), ("resnet56", 853_018), ("vgg16_bn", 14_724_042)],
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
    network = getattr(cifar_resnet, name)().eval()
    assert sum(tensor.numel() for tensor in network.parameters()) == parameters
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert getattr(cifar_resnet, name)(num_classes=7).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_vgg_from_float16_weights_computes_in_float32(tmp_path):
    network = cifar_resnet.vgg16_bn().eval()
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    loaded = load_model("secateur:vgg16_bn", tmp_path / "half.pth")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded[2].weight, network[2].weight.half().float())
    assert loaded(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
