"""What every quantizer promises: codes that fit, an error that is bounded, exact zeros, the same on every machine."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.envs.calibration.core import CHANNEL, DIAGONAL, FULL, NONE, LayerStatistics
from secateur.envs.core import InputError
from secateur.envs.quantization.packing import pack_bits, unpack_bits
from secateur.envs.quantization.quantizers import QUANTIZERS, ActivationGrid, QuantizedWeight
from secateur.envs.quantization.quantizers.common.activation_grids import ActivationGridConfig, choose_activation_grid
from secateur.envs.quantization.quantizers.dual_bounds import DualBounds, DualBoundsConfig
from secateur.envs.quantization.quantizers.gptq import GPTQ, GPTQConfig
from secateur.envs.quantization.quantizers.power_of_two import PowerOfTwo
from secateur.envs.quantization.quantizers.uniform import Uniform, UniformConfig

BITS = range(2, 9)
KINDS = (FULL, CHANNEL, DIAGONAL, NONE, None)


def make_statistics(kind=FULL, channels=4, area=9, groups=1, seed=0, diagonal=False):
    """Moments of correlated inputs that are above zero on average, as behind a ReLU."""
    if kind is None:
        return None
    rng = np.random.default_rng(seed)
    n = channels * (area if kind == FULL else 1)
    mix = np.eye(n) if diagonal else rng.normal(size=(groups, n, n)) / np.sqrt(n) + 0.3
    x = rng.normal(size=(groups, 5000, n)) @ mix
    if kind == DIAGONAL:
        moments = np.stack([x.mean(1), (x**2).mean(1)], axis=1)
    else:
        ones = np.concatenate([x, np.ones((groups, 5000, 1))], axis=2)
        moments = ones.transpose(0, 2, 1) @ ones / 5000
        if diagonal:
            moments = moments * np.eye(n + 1)
    moments = np.zeros(0, np.float32) if kind == NONE else moments.astype(np.float32)
    moments.flags.writeable = False  # as workers get them
    samples = np.sort(rng.normal(size=2000)).astype(np.float32)
    return LayerStatistics(kind, moments, float(samples[0]), float(samples[-1]), samples, area, 5000)


def make_weight(seed=0):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    weight[1] *= 100
    weight[2] = 0
    weight[3] *= 1e-30
    return weight


def per_channel(scale):
    return scale.view(-1, 1, 1, 1)


def output_error(weight, quantized, statistics):
    """E|(W - Q) u|^2 per output channel, by the definition, float64."""
    error = (weight - quantized.dequantize()).double()
    groups, area = len(statistics.moments), statistics.area
    matrix = torch.tensor(statistics.moments[:, :-1, :-1]).double()
    if statistics.kind == CHANNEL:  # pixels are taken as independent of each other
        matrix = torch.stack([torch.kron(block, torch.eye(area, dtype=torch.float64)) for block in matrix])
    rows = error.view(groups, len(error) // groups, -1)
    return (rows @ matrix * rows).sum(2).flatten()


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(("bits", "kind"), [*((bits, FULL) for bits in BITS), *((3, kind) for kind in KINDS[1:])])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name, bits, kind):
    config, make = QUANTIZERS[name]
    quantizer = pickle.loads(pickle.dumps(make(config())))
    weight, statistics = make_weight(), make_statistics(kind)
    before = weight.clone()
    quantized = quantizer.quantize_weight(weight, bits, statistics)
    assert torch.equal(weight, before)
    assert quantized.bits == bits
    codes, scale = quantized.codes, quantized.scale
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert -(2 ** (bits - 1)) <= codes.min() and codes.max() <= 2 ** (bits - 1) - 1
    assert scale.dtype == torch.float32 and scale.shape == (6,)
    assert (scale[[0, 1, 3, 4, 5]] > 0).all()
    values = quantized.dequantize()
    assert values.dtype == torch.float32 and values.isfinite().all()
    assert (values[2] == 0).all() and values[3].abs().max() > 0
    assert all(len(channel.unique()) <= 2**bits for channel in values)
    again = quantizer.quantize_weight(weight, bits, statistics)
    assert torch.equal(again.dequantize(), values)
    if quantized.levels is not None:
        assert quantized.levels.shape == (2**bits,) and quantized.levels.dtype == torch.float32
    # What is stored in b bits per code is the same weight.
    packed = pack_bits(codes.numpy(), bits)
    restored = torch.from_numpy(unpack_bits(packed, bits, tuple(codes.shape)))
    assert torch.equal(QuantizedWeight(restored, scale, bits, quantized.levels).dequantize(), values)


@pytest.mark.numerics
@pytest.mark.parametrize("name", QUANTIZERS)
def test_more_bits_mean_less_error(name):
    config, make = QUANTIZERS[name]
    weight, statistics = make_weight(), make_statistics()
    errors = [
        float(output_error(weight, make(config()).quantize_weight(weight, bits, statistics), statistics).sum())
        for bits in (2, 3, 4)
    ]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.2 * errors[2]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("make", [Uniform, PowerOfTwo])
def test_plain_rounding_is_idempotent(make, bits):
    once = make().quantize_weight(make_weight(), bits).dequantize()
    twice = make().quantize_weight(once, bits).dequantize()
    # Channels whose extreme codes are all clipped keep the grid but for a last bit of the scale.
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_scale_of_the_weight_does_not_matter(name):
    config, make = QUANTIZERS[name]
    weight, statistics = make_weight(), make_statistics()
    plain = make(config()).quantize_weight(weight, 3, statistics)
    scaled = make(config()).quantize_weight(weight * 2**-20, 3, statistics)
    assert torch.equal(scaled.codes, plain.codes) and torch.equal(scaled.scale, plain.scale * 2**-20)


@pytest.mark.parametrize("bits", [1, 9, 32])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_other_bit_widths_are_refused(name, bits):
    config, make = QUANTIZERS[name]
    with pytest.raises(ValueError, match=str(bits)):
        make(config()).quantize_weight(make_weight(), bits, make_statistics())
    with pytest.raises(ValueError, match=str(bits)):
        make(config()).activation_grid(make_statistics(), bits)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_options_out_of_range_are_input_errors(name):
    config, _ = QUANTIZERS[name]
    if hasattr(config, "activations"):
        with pytest.raises(InputError, match="median"):
            config(activations="median")
    with pytest.raises(InputError, match="0.999"):
        config(percentile=0.999)
    if hasattr(config, "clip"):
        with pytest.raises(InputError, match=f"`{name}`.*middle"):
            config(clip="middle")


def test_damping_must_be_above_zero():
    with pytest.raises(InputError, match="damping"):
        GPTQConfig(damping=0)


# --------------------------------------------------------------------------------------------------------- power of two


@pytest.mark.parametrize("bits", BITS)
def test_powers_of_two_are_the_nearest_ones(bits):
    weight = make_weight()
    quantized = PowerOfTwo().quantize_weight(weight, bits)
    used = quantized.levels.unique()
    exponents = range(min(2 ** (bits - 1) - 2, 23) + 1)
    assert used.tolist() == sorted([-(2.0**-i) for i in exponents] + [0.0] + [2.0**-i for i in exponents])
    relative = (weight / per_channel(quantized.scale))[[0, 1, 4, 5]]
    nearest = (relative[..., None] - used).abs().amin(-1)
    found = (relative - quantized.dequantize()[[0, 1, 4, 5]] / per_channel(quantized.scale)[[0, 1, 4, 5]]).abs()
    assert torch.allclose(found, nearest, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- gptq


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("kind", "groups"), [(FULL, 1), (CHANNEL, 1), (FULL, 6), (FULL, 2), (CHANNEL, 3)])
def test_compensation_never_adds_error_and_mostly_removes_a_lot(bits, kind, groups, seed):
    weight, statistics = make_weight(seed), make_statistics(kind, groups=groups, seed=seed)
    undamped = GPTQ(GPTQConfig(damping=1e-6))
    plain = output_error(weight, Uniform().quantize_weight(weight, bits), statistics)
    compensated = output_error(weight, undamped.quantize_weight(weight, bits, statistics), statistics)
    assert compensated.sum() <= 1.0001 * plain.sum()
    if bits > 2:  # there the grid may be another, which is chosen for the layer as a whole
        assert (compensated <= 1.0001 * plain).all()
    assert (compensated / plain)[[0, 1, 4, 5]].mean() < 0.8


@pytest.mark.parametrize("bits", BITS)
def test_uncorrelated_inputs_leave_nothing_to_compensate(bits):
    weight, statistics = make_weight(), make_statistics(diagonal=True)
    found = GPTQ().quantize_weight(weight, bits, statistics)
    if bits > 2:
        assert torch.equal(found.dequantize(), Uniform().quantize_weight(weight, bits).dequantize())
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) if found.levels is None else found.levels
    used = [0, 1, 4, 5]
    relative = (weight / per_channel(found.scale))[used]
    assert torch.allclose(
        (relative - found.dequantize()[used] / per_channel(found.scale)[used]).abs(),
        (relative[..., None] - levels).abs().amin(-1).where(relative >= -levels.max(), (relative + levels.max()).abs()),
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", [DIAGONAL, NONE, None])
def test_without_covariances_rounding_is_plain(kind):
    weight = make_weight()
    found = GPTQ().quantize_weight(weight, 3, make_statistics(kind))
    assert torch.equal(found.dequantize(), Uniform().quantize_weight(weight, 3).dequantize())


def test_two_bits_keep_a_ternary_layer_exactly():
    weight = torch.randint(-1, 2, (6, 4, 3, 3), generator=torch.Generator().manual_seed(0)) * torch.rand(6, 1, 1, 1)
    found = GPTQ().quantize_weight(weight, 2, make_statistics())
    assert torch.allclose(found.dequantize(), weight, rtol=1e-6)


def test_two_bits_use_four_values_where_that_is_better():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = GPTQ().quantize_weight(weight, 2, make_statistics())
    assert len(found.dequantize()[0].unique()) == 4


def test_the_grid_is_that_of_the_channels_that_matter():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (6, 4, 3, 3), generator=generator).float()
    weight[0] = 100 * torch.randn(4, 3, 3, generator=generator)
    assert len(GPTQ().quantize_weight(weight, 2, make_statistics()).dequantize()[0].unique()) == 4
    weight[0] /= 10_000
    assert len(GPTQ().quantize_weight(weight, 2, make_statistics()).dequantize()[0].unique()) <= 3


def test_columns_are_compensated_across_blocks():
    """Two equal inputs: what the first loses, the second can make up for, however far away it is."""
    channels = 150
    matrix = np.eye(channels + 1, dtype=np.float32)
    matrix[0, 149] = matrix[149, 0] = 0.9999
    matrix[0, 0] = 1.0001
    statistics = replace(make_statistics(CHANNEL, channels, 1), moments=matrix[None])
    weight = torch.full((1, channels), 0.25)
    weight[0, 1] = 1.0
    weight[0, [0, 149]] = 0.35
    quantizer = GPTQ(GPTQConfig(damping=1e-6))
    found = quantizer.quantize_weight(weight, 8, statistics)
    # 0.7 together, to half a step of one of them; alone, each is rounded the same way.
    assert float(found.dequantize()[0, [0, 149]].sum()) == pytest.approx(0.7, abs=float(found.scale) * 0.51)
    coarse = quantizer.quantize_weight(weight, 3, statistics)
    plain = Uniform().quantize_weight(weight, 3)
    assert torch.equal(coarse.dequantize()[0, 1:149], plain.dequantize()[0, 1:149])
    assert coarse.dequantize()[0, 0] != coarse.dequantize()[0, 149] or coarse.scale * 0.5 > 0.35


def test_groups_and_inputs_that_are_always_zero_are_rounded_plainly():
    weight, statistics = make_weight(), make_statistics(groups=6)
    moments = statistics.moments.copy()
    moments[4, :-1] = moments[4, :, :-1] = 0
    found = GPTQ().quantize_weight(weight, 3, replace(statistics, moments=moments)).dequantize()
    assert torch.equal(found[4], Uniform().quantize_weight(weight, 3).dequantize()[4])
    found = GPTQ().quantize_weight(weight, 3, replace(statistics, moments=np.zeros_like(moments))).dequantize()
    assert torch.equal(found, Uniform().quantize_weight(weight, 3).dequantize())


# ---------------------------------------------------------------------------------------------------------- activations


def spread(low, high, samples=None):
    samples = np.linspace(low, high, 1000) if samples is None else np.sort(samples)
    return replace(make_statistics(NONE), low=low, high=high, samples=samples.astype(np.float32))


@pytest.mark.parametrize("activations", ["max", "mse", "percentile"])
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.9), (0.0, 5.0), (0.4, 7.0), (-3.0, -1.0), (0.0, 0.0), (-1e-30, 1e-30)])
def test_activation_grid_holds_zero_and_stays_in_the_range(bits, low, high, activations):
    grid = choose_activation_grid(spread(low, high), bits, ActivationGridConfig(activations=activations))
    assert 0 <= grid.zero_point <= grid.max_code == 2**bits - 1
    assert isinstance(grid.scale, float) and isinstance(grid.zero_point, int) and grid.scale > 0
    values = (np.arange(2**bits) - grid.zero_point) * grid.scale
    assert 0.0 in values.tolist()
    assert values[-1] - values[0] <= (max(high, 0) - min(low, 0)) * 1.00001 or low == high == 0
    if activations == "max":
        assert values[0] <= min(low, 0) + grid.scale * 0.501 and values[-1] >= max(high, 0) - grid.scale * 0.501


def rounding_error(grid, samples):
    codes = np.clip(np.rint(samples / grid.scale) + grid.zero_point, 0, grid.max_code)
    return np.mean(((codes - grid.zero_point) * grid.scale - samples) ** 2)


@pytest.mark.numerics
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "relu", "negative"])
def test_least_error_is_close_to_a_fine_search(bits, shape):
    samples = np.random.default_rng(0).normal(size=1000) + 0.5
    samples = {"normal": samples, "relu": samples.clip(0), "negative": -samples.clip(0)}[shape]
    statistics = spread(float(samples.min()), float(samples.max()), samples)
    found = choose_activation_grid(statistics, bits, ActivationGridConfig(activations="mse"))
    maximal = choose_activation_grid(statistics, bits, ActivationGridConfig(activations="max"))
    ends = [np.linspace(0.1, 1, 20) * end for end in (samples.min(), samples.max())]
    best = min(
        rounding_error(choose_activation_grid(spread(low, high, samples), bits, ActivationGridConfig(activations="max")), samples)
        for low in np.unique(ends[0])
        for high in np.unique(ends[1])
    )
    assert rounding_error(found, samples) <= 1.1 * best
    assert rounding_error(found, samples) <= rounding_error(maximal, samples) * 1.0001
    if bits < 8:
        assert rounding_error(found, samples) < 0.8 * rounding_error(maximal, samples)


def test_percentile_leaves_out_the_tails():
    samples = np.random.default_rng(0).normal(size=4000)
    statistics = spread(-1000.0, 1000.0, samples)
    grid = choose_activation_grid(statistics, 8, ActivationGridConfig(activations="percentile", percentile=99.0))
    low, high = np.percentile(samples, [1, 99])
    assert -grid.zero_point * grid.scale == pytest.approx(low, abs=grid.scale)
    assert (255 - grid.zero_point) * grid.scale == pytest.approx(high, abs=grid.scale)


# --------------------------------------------------------------------------------------------------------- dual bounds


def asymmetric(seed=0):
    """Values as in networks without batch norms: the positive side is six times wider, and a few are far away."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=2000)
    return np.concatenate([np.where(values > 0, 3 * values, 0.5 * values), [60.0, -12.0]])


def uniform_grid(samples, bits, activations, **options):
    statistics = spread(float(samples.min()), float(samples.max()), samples)
    return choose_activation_grid(statistics, bits, ActivationGridConfig(activations=activations, **options))


def dual_grid(samples, bits, **options):
    return DualBounds(DualBoundsConfig(**options)).activation_grid(
        spread(float(samples.min()), float(samples.max()), samples), bits
    )


@pytest.mark.numerics
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dual_bounds_have_less_error_than_other_ranges(bits, seed):
    samples = asymmetric(seed)
    found = rounding_error(dual_grid(samples, bits), samples)
    assert found < (0.8 if bits < 8 else 1.0) * rounding_error(uniform_grid(samples, bits, "max"), samples)
    assert found < rounding_error(uniform_grid(samples, bits, "percentile", percentile=99.0), samples)
    symmetric = [ActivationGrid(2 * bound / (2**bits - 1), 2 ** (bits - 1), bits) for bound in np.linspace(0.1, 60, 600)]
    assert found < 0.85 * min(rounding_error(grid, samples) for grid in symmetric)
    # The default of the other quantizers tries pairs of ends too, but fewer.
    assert found < 1.01 * rounding_error(uniform_grid(samples, bits, "mse"), samples)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("percentile", [60.0, 99.0, 100.0])
@pytest.mark.parametrize("shape", ["normal", "relu", "negative", "far", "outliers", "none", "tiny"])
def test_dual_bounds_are_never_worse_than_where_they_start(shape, percentile, bits):
    values = np.random.default_rng(0).normal(size=1000)
    samples = {"normal": values, "relu": values.clip(0), "negative": -values.clip(0), "far": values + 20,
               "outliers": asymmetric(), "none": 0 * values, "tiny": 1e-30 * values}[shape]  # fmt: skip
    grid = dual_grid(samples, bits, percentile=percentile)
    assert 0 <= grid.zero_point <= grid.max_code == 2**bits - 1 and 0 < grid.scale < np.inf
    for start in (("max", 100.0), ("percentile", percentile)):
        other = uniform_grid(samples, bits, start[0], percentile=start[1])
        assert rounding_error(grid, samples) <= rounding_error(other, samples) * 1.000001


def test_dual_bounds_of_a_two_sided_grid_are_exact():
    """Values on a grid from -2 to 13 in steps of 1, the ends rare: all sixteen codes are needed, and nothing is lost."""
    samples = np.concatenate([np.arange(-2.0, 14.0), np.zeros(500), np.ones(500)])
    grid = dual_grid(samples, 4)
    assert (grid.scale, grid.zero_point) == (pytest.approx(1.0), 2) and rounding_error(grid, samples) < 1e-10


def test_the_ends_of_the_calibration_count_as_samples():
    """A sample of 2,000 values misses the ends of a long tail: with 8 bits, the grid reaches far beyond the sample."""
    statistics = spread(-1.0, 20.0, np.random.default_rng(0).normal(size=2000).clip(-1))
    for bits, least, most in ((8, 15.0, 20.1), (2, 0.0, 5.0)):
        grid = DualBounds().activation_grid(statistics, bits)
        assert least < (grid.max_code - grid.zero_point) * grid.scale < most
    other = choose_activation_grid(statistics, 8, ActivationGridConfig(activations="mse"))
    assert (other.max_code - other.zero_point) * other.scale < 5.0


def test_dual_bounds_round_weights_as_their_option_says():
    weight, statistics = make_weight(), make_statistics()
    for name, make in (("uniform", Uniform), ("gptq", GPTQ)):
        found = DualBounds(DualBoundsConfig(weights=name)).quantize_weight(weight, 3, statistics)
        assert torch.equal(found.dequantize(), make().quantize_weight(weight, 3, statistics).dequantize())
    with pytest.raises(InputError, match="`dual_bounds`.*binary"):
        DualBoundsConfig(weights="binary")


# -------------------------------------------------------------------------------------------------------------- uniform


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", ["max", "mse"])
def test_uniform_error_is_at_most_half_a_step_inside_the_range(bits, clip):
    weight = make_weight()
    quantized = Uniform(UniformConfig(clip=clip)).quantize_weight(weight, bits)
    found, scale = quantized.dequantize(), per_channel(quantized.scale)
    assert quantized.codes.abs().max() <= 2 ** (bits - 1) - 1
    high = (2 ** (bits - 1) - 1) * scale
    error, inside = (found - weight).abs(), weight.abs() <= high
    assert (error <= scale * 0.500001)[inside].all()
    if clip == "max":
        assert (inside | (error <= scale * 1e-5)).all()
    assert torch.equal(found[weight > high], high.expand_as(weight)[weight > high])


@pytest.mark.numerics
@pytest.mark.parametrize("bits", BITS)
def test_mse_clipping_is_close_to_a_fine_search_and_pays_at_few_bits(bits):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    errors = {
        clip: (Uniform(UniformConfig(clip=clip)).quantize_weight(weight, bits).dequantize() - weight).square().sum(1).mean()
        for clip in ("max", "mse")
    }
    largest = weight.abs().amax(1)
    best = torch.full((64,), float("inf"))
    for share in torch.linspace(0.1, 1, 400):
        scale = share * largest / (2 ** (bits - 1) - 1)
        codes = (weight / scale[:, None]).round().clamp(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
        best = torch.minimum(best, (codes * scale[:, None] - weight).square().sum(1))
    # Not shrinking costs some of the error at few bits; at many, the fine search gains a little.
    assert errors["mse"] <= (1.1 if bits > 2 else 1.5) * best.mean()
    if bits <= 4:
        assert errors["mse"] < 0.8 * errors["max"]


@pytest.mark.parametrize("make", [Uniform, PowerOfTwo])
@pytest.mark.parametrize("bits", BITS)
def test_rounded_weights_keep_their_gain(bits, make):
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    found = make().quantize_weight(weight, bits).dequantize()
    gain = (found * weight).sum(1) / weight.square().sum(1)
    # Powers of two are half of each other, however many bits: the largest weight often ends as the top level itself.
    tolerance = {2: 0.06, 3: 0.03}.get(bits, 0.03 if make is PowerOfTwo else 0.01)
    assert gain.mean() == pytest.approx(1, abs=tolerance)
