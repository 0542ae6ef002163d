"""Properties of the grids: error, levels, idempotence, zero, and the clipping that pays."""

import pickle

import pytest
import torch

from envs.core import InputError
from envs.quantization.quantizers import QUANTIZERS, dequantize
from envs.quantization.quantizers.uniform import Uniform, UniformConfig

BITS = range(2, 9)


def make_weight(seed=0):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    weight[1] *= 100
    weight[2] = 0
    weight[3] *= 1e-30
    return weight


def per_channel(scale):
    return scale.view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
def test_contract(name, bits):
    config, make = QUANTIZERS[name]
    quantizer = pickle.loads(pickle.dumps(make(config())))
    weight = make_weight()
    before = weight.clone()
    codes, scale = quantizer.quantize_weight(weight, bits)
    assert torch.equal(weight, before)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == torch.float32 and scale.shape == (6,) and (scale > 0).all()
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.isfinite(dequantize(codes, scale)).all()
    assert (dequantize(codes, scale)[2] == 0).all()
    again, again_scale = quantizer.quantize_weight(dequantize(codes, scale), bits)
    assert torch.allclose(dequantize(again, again_scale), dequantize(codes, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", ["max", "mse"])
def test_weight_error_is_at_most_half_a_step_inside_the_range(bits, clip):
    weight = make_weight()
    codes, scale = Uniform(UniformConfig(clip)).quantize_weight(weight, bits)
    high = (2 ** (bits - 1) - 1) * per_channel(scale)
    low = -high
    error = (dequantize(codes, scale) - weight).abs()
    inside = (weight >= low) & (weight <= high)
    assert (error <= per_channel(scale) * 0.500001)[inside].all()
    if clip == "max":
        assert (inside | (error <= per_channel(scale) * 1e-5)).all()
    assert torch.equal(dequantize(codes, scale)[weight > high], high.expand_as(weight)[weight > high])


@pytest.mark.parametrize("bits", BITS)
def test_mse_clipping_is_close_to_a_fine_search_and_pays_at_few_bits(bits):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    errors = {}
    for clip in ("max", "mse"):
        codes, scale = Uniform(UniformConfig(clip)).quantize_weight(weight, bits)
        errors[clip] = (dequantize(codes, scale) - weight).square().sum(1).mean()
    largest = weight.abs().amax(1)
    best = torch.full((64,), float("inf"))
    for share in torch.linspace(0.1, 1, 400):
        scale = share * largest / (2 ** (bits - 1) - 1)
        codes = (weight / scale[:, None]).round().clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        best = torch.minimum(best, (codes * scale[:, None] - weight).square().sum(1))
    # Not shrinking costs some of the error at few bits; at many, the fine search gains a little by luck.
    assert errors["mse"] <= (1.1 if bits > 2 else 1.5) * best.mean()
    if bits <= 4:
        assert errors["mse"] < 0.8 * errors["max"]


@pytest.mark.parametrize("bits", BITS)
def test_rounded_weights_keep_their_gain(bits):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    codes, scale = Uniform().quantize_weight(weight, bits)
    gain = (dequantize(codes, scale) * weight).sum(1) / weight.square().sum(1)
    assert gain.mean() == pytest.approx(1, abs={2: 0.06, 3: 0.03}.get(bits, 0.01))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 5.0), (0.4, 7.0), (-3.0, -1.0), (0.0, 0.0)])
def test_activation_grid_covers_the_range_and_holds_zero(bits, low, high):
    grid = Uniform().activation_grid(low, high, bits)
    assert 0 <= grid.zero_point <= grid.max_code == 2**bits - 1
    values = (torch.arange(2**bits) - grid.zero_point) * grid.scale
    assert 0.0 in values.tolist()
    assert values[0] <= min(low, 0) + grid.scale * 0.501 and values[-1] >= max(high, 0) - grid.scale * 0.501
    assert values[-1] - values[0] <= (max(high, 0) - min(low, 0)) * 1.00001 or low == high == 0


@pytest.mark.parametrize("bits", [1, 9, 32])
def test_other_bit_widths_are_refused(bits):
    with pytest.raises(ValueError, match=str(bits)):
        Uniform().quantize_weight(make_weight(), bits)
    with pytest.raises(ValueError, match=str(bits)):
        Uniform().activation_grid(0, 1, bits)


def test_unknown_clipping_is_an_input_error():
    with pytest.raises(InputError, match="median"):
        UniformConfig(clip="median")
