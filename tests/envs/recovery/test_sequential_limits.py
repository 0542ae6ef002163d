"""Refits in sequence leave alone what they cannot refit, keep to their limits, and work with quantized weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.core import InputError
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery import RECOVERIES
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.envs.recovery.sequential import Sequential, SequentialConfig
from tests.envs.recovery.sequential_cases import INNER, Residual, error, pictures, policy, problem, recovered, with_statistics

# -------------------------------------------------------------------------------------------------------- left as they are


class Shared(nn.Module):
    """A layer that runs twice, attention and a layer that never runs; a transposed layer and one with reflecting padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.idle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        x = F.relu(self.down(F.relu(self.up(F.relu(self.reflect(x))))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1) + self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.mark.numerics
def test_layers_that_cannot_be_refitted_are_left_alone():
    torch.manual_seed(0)
    model, images = with_statistics(Shared()), pictures(60)
    sequential, sliced = recovered(model, images, Sequential()), recovered(model, images)
    for name in ("twice", "attention.out_proj", "idle", "reflect", "up", "down"):
        pair = sequential.get_submodule(name).weight, sliced.get_submodule(name).weight
        assert torch.equal(*pair) is (name not in ("twice", "reflect", "up", "down")), name
    # A layer that runs several times is refitted from the dense network's moments.
    assert torch.equal(sequential.twice.weight, recovered(model, images, LeastSquares()).twice.weight)
    assert error(sequential, model, images) < error(sliced, model, images)


def test_other_functions_than_the_dense_networks_stop_the_refits(caplog):
    class Fickle(Residual):
        def forward(self, x):
            x = F.relu(self.stem_norm(self.stem(x)))
            x = self.block("a", x)
            if self.b1.weight.shape[0] < 16:
                x = x * 1.0
            return self.head(self.block("b", x).mean((2, 3)))

    torch.manual_seed(0)
    model, images = with_statistics(Fickle()), pictures(40)
    network, sliced = recovered(model, images, Sequential(), names=INNER), recovered(model, images, names=INNER)
    assert not torch.equal(network.a2.weight, sliced.a2.weight)
    assert torch.equal(network.b2.weight, sliced.b2.weight) and torch.equal(network.head.weight, sliced.head.weight)
    assert "not refitted" in caplog.text


class SequenceFirst(nn.Module):
    """Tokens on the first axis, images on the second: rows of different batches are in different order."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.token1, self.token2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        tokens = F.relu(self.stem(x)).flatten(2).permute(2, 0, 1)
        return self.head(self.token2(F.relu(self.token1(tokens))).mean(0))


@pytest.mark.numerics
def test_layers_whose_first_axis_is_not_that_of_the_images_are_refitted_from_the_dense_moments():
    torch.manual_seed(0)
    model, images = with_statistics(SequenceFirst()), pictures(150)
    network, sliced = recovered(model, images, Sequential()), recovered(model, images)
    assert torch.equal(network.token2.weight, recovered(model, images, LeastSquares()).token2.weight)
    assert error(network, model, images) < error(sliced, model, images)


# ------------------------------------------------------------------------------------------------------------ soundness


@pytest.mark.numerics
def test_fewer_samples_than_unknowns_do_no_harm(residual):
    model, images, others = residual
    few = Sequential(SequentialConfig(max_images=4, samples=20))
    assert error(recovered(model, images, few, names=INNER), model, others) < error(
        recovered(model, images, names=INNER), model, others
    )


def test_damping_pulls_to_the_present_weights(residual):
    model, images, _ = residual
    strong = recovered(model, images, Sequential(SequentialConfig(damping=1e9)), names=INNER)
    weights = {name: p for name, p in recovered(model, images, names=INNER).named_parameters() if name.endswith("weight")}
    for name, parameter in weights.items():
        assert torch.allclose(strong.get_parameter(name), parameter, atol=1e-5), name


def test_layers_with_too_many_unknowns_keep_their_weight_and_their_mean(residual):
    model, images, _ = residual
    network = recovered(model, images, Sequential(SequentialConfig(max_inputs=70, samples=10**6)), names=INNER)
    sliced = recovered(model, images, names=INNER)
    for name in ("a2", "b1", "b2"):
        assert torch.equal(network.get_submodule(name).weight, sliced.get_submodule(name).weight)
    means = []
    for tried in (model, network):
        seen = []
        tried.a2_norm.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.clone()))
        tried(images)
        tried.a2_norm._forward_hooks.clear()
        means.append(seen[0].mean((0, 2, 3)))
    assert torch.allclose(means[0], means[1], atol=1e-2)
    assert not torch.equal(network.a2_norm.running_mean, sliced.a2_norm.running_mean)


def test_dead_batch_norm_channels_stay_finite():
    torch.manual_seed(0)
    model, images = with_statistics(Residual()), pictures(60)
    model.a2_norm.weight.data[0] = 0.0
    model.b1_norm.weight.data[3] = 1e-12
    network = recovered(model, images, Sequential(), names=INNER)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


def test_memory_bounds_cut_images_and_samples(residual):
    model, images, _ = residual
    tight = Sequential(SequentialConfig(max_bytes=400_000, max_target_bytes=100_000))
    assembler = problem(model, images, [tight])
    assembler.assemble(policy(assembler, names=INNER))
    targets = assembler.cache.get(("sequential", tight.config, 1), None)
    assert 1 <= targets.images < len(images)
    assert sum(values.nbytes for values in targets.values.values()) < 150_000
    assert len(targets.values["a2"]) > len(targets.values["stem"])  # 144 unknowns and 27


@pytest.mark.parametrize(
    ("option", "value"),
    [("damping", 0), ("max_images", 0), ("samples", 0), ("max_inputs", 0), ("clip_rounds", -1), ("max_bytes", 0)],
)
def test_options_out_of_range_are_input_errors(option, value):
    with pytest.raises(InputError, match=option):
        SequentialConfig(**{option: value})


# -------------------------------------------------------------------------------------------------------- quantization


@pytest.mark.numerics
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_rounding_is_absorbed_by_later_layers(quantizer, residual):
    model, images, others = residual
    config, make = QUANTIZERS[quantizer]
    plain, sequential = (
        recovered(model, images, *recoveries, names=INNER, bits=(4, 4), quantizer=make(config()))
        for recoveries in ((LeastSquares(),), (Sequential(),))
    )
    assert all(len(layer.weight[0].unique()) <= 16 for layer in sequential.modules() if isinstance(layer, nn.Conv2d))
    assert error(sequential, model, others) < error(plain, model, others)


def test_quantizer_sees_the_moments_of_the_real_inputs(residual):
    model, images, _ = residual
    seen = {}

    class Spy(Uniform):
        def quantize_weight(self, weight, bits, statistics=None):
            seen[tuple(weight.shape)] = statistics
            return super().quantize_weight(weight, bits, statistics)

    network = recovered(model, images, Sequential(SequentialConfig(samples=10**6)), names=("a1",), bits=(4, 32), quantizer=Spy())
    statistics = seen[tuple(network.a2.weight.shape)]
    inputs = []
    network.a2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network(images)
    rows = F.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = F.pad(rows, (0, 1), value=1.0).double()
    assert statistics.moments[0] == pytest.approx((rows.T @ rows / len(rows)).detach().numpy(), abs=1e-3)
    assert statistics.channels == network.a2.weight.shape[1]


def test_mean_error_of_rounding_goes_to_the_intercept_once(residual):
    model, images, _ = residual
    bias_correction, sequential = RECOVERIES.get("bias_correction"), Sequential(SequentialConfig(samples=10**6, clip_rounds=0))
    networks = [recovered(model, images, sequential, names=INNER, bits=(3, 32))]
    if bias_correction:
        networks.append(recovered(model, images, sequential, bias_correction[1](), names=INNER, bits=(3, 32)))
    for network in networks:
        difference = network(images) - model(images)
        assert difference.mean(0).abs().max() < 1e-4
