"""Scores use a faster way to the grid: the values are the operator's, bit for bit."""

import pytest
import torch
from torch import nn

from secateur.envs.quantization.fake_quantize import ActivationQuantizer, activation_grid, set_activation_grid, use_integer_inputs
from secateur.envs.quantization.quantizers.core import ActivationGrid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "zero_point", "bits"), [(0.0123, 0, 8), (0.1, 7, 4), (0.5, 3, 2), (3.7e-5, 200, 8), (1.0, 0, 3)]
)
def test_the_fast_way_gives_the_same_values(scale, zero_point, bits, dtype):
    grid = ActivationGrid(scale, zero_point, bits)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 32, 32, generator=generator) * scale * 2**bits
    ties = (torch.arange(-20, 300) + 0.5) * torch.tensor(scale)  # halves, where one last bit decides
    x.view(-1)[: len(ties)] = ties
    x = x.to(dtype=dtype, memory_format=torch.channels_last)
    before, quantizer = x.clone(), ActivationQuantizer(grid)
    expected = quantizer.round(x)
    with torch.inference_mode():
        found = quantizer.round(x)
    assert torch.equal(found, expected) and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)
    assert dtype == torch.bfloat16 or len(found.unique()) == 2**bits


def test_integer_inputs_are_exact_in_bfloat16_and_the_function_stays():
    grid = ActivationGrid(0.0123, 9, 8)
    x = torch.linspace(-1, 4, 3000).view(1000, 3)
    layer = nn.Linear(3, 3)
    nn.init.eye_(layer.weight)
    set_activation_grid(layer, grid)
    dense_weight, expected = layer.weight, layer(x)
    seen = []
    use_integer_inputs(layer)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert torch.allclose(layer(x), expected, atol=1e-6) and activation_grid(layer) is grid
    assert torch.equal(dense_weight, torch.eye(3)), "another network may share the old weight"
    use_integer_inputs(layer)
    assert torch.allclose(layer(x), expected, atol=1e-6), "a second call changes nothing"
    layer.bfloat16()(x.bfloat16())
    codes = (x.bfloat16().float() / grid.scale).round().clamp(-9, 246)
    assert seen[-1].dtype == torch.bfloat16 and torch.equal(seen[-1].float(), codes)
    multiples = ActivationQuantizer(grid).round(x.bfloat16()).float()
    assert not torch.equal((multiples / grid.scale), codes), "which multiples of the scale would not be"
