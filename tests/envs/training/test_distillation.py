"""Training with distillation: what it learns from, what it stores, and that a killed training continues bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.core import InputError
from secateur.envs.inputs import Arguments
from secateur.envs.metric import DIVERGENCE
from secateur.envs.quantization.estimators.straight_through import StraightThrough
from secateur.envs.quantization.fake_quantize import quantized_weight, set_activation_grid, set_quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS, ActivationGrid
from secateur.envs.quantization.trainable import make_quantized, make_trainable
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.core import Batch
from secateur.envs.tasks.functions import FunctionTask
from secateur.envs.tasks.regression import Regression
from secateur.envs.tasks.splits import Split
from secateur.envs.training.distillation import Training, Watch, imitation_loss, task_loss
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import labeled_samples, unlabeled_samples

DATA = synthetic.load(train=96)
TASK = Classification(DATA)


class Net(nn.Module):
    """A network with everything that a checkpoint must keep: batch norm, dropout, and a buffer that no state dict has."""

    def __init__(self, seed=0, width=4):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width * 9, synthetic.NUM_CLASSES)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.linear(F.dropout(self.norm(self.conv(x)).relu().flatten(1), 0.2, self.training))


def quantized(network, bits=4):
    """The network with weights and inputs in bits."""
    config, quantizer = QUANTIZERS["uniform"]
    for layer in (network.conv, network.linear):
        set_quantized_weight(layer, quantizer(config()).quantize_weight(layer.weight, bits))
    set_activation_grid(network.linear, ActivationGrid(0.02, 0, 8))
    return network


def training(teacher=None, samples=None, task=TASK, checkpoint=None, identity=None, **options):
    samples = samples or labeled_samples(DATA, DATA.train, options.get("shift", 0), options.get("flip", False))
    config = DistillationConfig(**{"epochs": 3, "batch_size": 32, **options})
    return Training(task, teacher, samples, config, checkpoint, identity or {})


def tensors(network):
    return {name: x.detach().clone() for name, x in (*network.named_parameters(), *network.named_buffers())}


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_that_of_the_equation():
    torch.manual_seed(0)
    wanted, outputs, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    task = replace(TASK, data=replace(DATA, num_classes=6))
    found = training(lambda x: wanted, task=task, temperature=2.0, distillation=0.25)._loss(
        lambda x: outputs, Batch(None, labels)
    )
    soft, hard = F.softmax(wanted / 2, 1), F.log_softmax(outputs / 2, 1)
    expected = 0.75 * F.cross_entropy(outputs, labels) + 0.25 * 4 * F.kl_div(hard, soft, reduction="batchmean")
    torch.testing.assert_close(found, expected)


def test_labels_are_smoothed():
    torch.manual_seed(0)
    outputs, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    expected = F.cross_entropy(outputs, labels, label_smoothing=0.3)
    torch.testing.assert_close(task_loss(TASK, lambda x: outputs, Batch(None, labels), 0.3), expected)


def test_outputs_that_are_no_class_scores_are_compared_by_the_divergence_of_the_task():
    task = FunctionTask(DIVERGENCE, (), lambda model: 0.0, compare=lambda wanted, found: (wanted[0] - found[0]).abs().sum(1))
    wanted, found = (torch.zeros(2, 3), torch.zeros(2)), (torch.ones(2, 3), torch.ones(2))
    assert imitation_loss(task, wanted, found, temperature=4.0) == 3


@pytest.mark.numerics
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distillation_without_labels_comes_closer_to_the_dense_model(seed):
    """The student is the teacher with noise in its weights; samples have no targets."""
    teacher, torch_inputs = Net(seed).eval(), DATA.tensors(DATA.calibration)[0]
    student = Net(seed).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter)
    trained = training(teacher, unlabeled_samples(torch_inputs), epochs=6, batch_size=16, learning_rate=0.02).run(student)
    inputs = DATA.tensors(DATA.test)[0]
    with torch.inference_mode():
        before, after = (imitation_loss(TASK, teacher(inputs), one(inputs), 4.0) for one in (student, trained.network))
    assert after < 0.8 * before


def test_several_losses_of_a_batch_need_one_pass():
    passes = []

    class Counting(Net):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    training(Net(1).eval(), epochs=1, label_smoothing=0.1).run(Counting())
    assert passes == [32, 32, 32]


def test_teacher_and_student_see_the_same_augmented_images_once_per_epoch():
    seen = {"teacher": [], "student": []}

    class Seeing(Net):
        who = "student"

        def forward(self, x):
            seen[self.who].append(x.detach().clone())
            return super().forward(x)

    teacher = Seeing().eval()
    teacher.who = "teacher"
    training(teacher, shift=1, flip=True, epochs=2).run(Seeing())
    shown = torch.cat(seen["student"])
    assert torch.equal(shown, torch.cat(seen["teacher"])) and len(shown) == 2 * len(DATA.train)
    assert not torch.equal(shown[:96].sum(0), shown[96:].sum(0)), "drawn anew in each epoch"


def test_several_inputs_are_trained_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.linear(a) + b

    inputs = Arguments((torch.randn(16, 4), torch.randn(16, 2)))
    task = FunctionTask(DIVERGENCE, (), lambda model: 0.0)
    start = Two()
    found = training(Two().eval(), unlabeled_samples(inputs), task, epochs=1).run(start)
    assert found.epochs[0].loss == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        start.linear.weight[0] += 1
    found = training(Two().eval(), unlabeled_samples(inputs), task, epochs=20, learning_rate=0.1).run(start)
    assert found.epochs[-1].loss < 0.5 * found.epochs[0].loss


# ------------------------------------------------------------------------------------------------------------- recipe


def rates(**options):
    config = DistillationConfig(**options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = config.make_schedule(optimizer, 10 * config.epochs)
    found = []
    for _ in range(10 * config.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_short_training_starts_low_and_only_falls():
    found = rates(epochs=5)
    assert 2e-3 <= found[0] <= 3e-3 and found == sorted(found, reverse=True) and found[-1] < 1e-5


def test_a_long_training_has_one_cycle():
    found = rates(epochs=15)
    assert max(found) == pytest.approx(0.01) and found[0] == pytest.approx(1e-3) and found[-1] <= 1e-4
    peak = int(np.argmax(found))
    assert 0.2 < peak / len(found) < 0.4 and found[:peak] == sorted(found[:peak])


def test_schedule_and_rate_can_be_chosen():
    assert rates(epochs=20, schedule="cosine", learning_rate=0.5)[0] == 0.5
    assert max(rates(epochs=2, schedule="one_cycle", learning_rate=0.5)) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1}, {"batch_size": 1}, {"learning_rate": 0.0}, {"schedule": "step"}, {"momentum": 1.0}, {"temperature": 0.0},
        {"distillation": 1.5}, {"label_smoothing": 1.0}, {"ema": 1.0}, {"shift": -1}, {"precision": "float16"},
        {"weight_decay": math.nan},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=f"`{next(iter(options))}` of the training must be .* but got"):
        DistillationConfig(**options)


def test_the_average_follows_the_weights():
    """With a decay of nearly 1, the average lags behind; without one, the last weights count."""
    last = training(epochs=2, distillation=0.0).run(Net())
    averaged = training(epochs=2, distillation=0.0, ema=0.99).run(Net())
    assert not same(last.network, averaged.network)
    start = Net().conv.weight
    distances = [(one.network.conv.weight - start).norm() for one in (averaged, last)]
    assert 0 < distances[0] < distances[1]
    assert averaged.network.norm.num_batches_tracked == last.network.norm.num_batches_tracked == 6


# --------------------------------------------------------------------------------------------------------- resumption


class Killed(Exception):
    pass


def kill_at(share):
    def batch(progress):
        if progress.done >= share:
            raise Killed

    return Watch(batch=batch, score=lambda network: float(torch.rand(())))


EVERYTHING = {"shift": 1, "flip": True, "ema": 0.9, "schedule": "one_cycle", "epochs": 4, "label_smoothing": 0.1}


@pytest.mark.parametrize(("share", "estimator"), [(0.2, "straight_through"), (0.5, "learned_step"), (0.8, "asymptotic")])
def test_a_killed_training_continues_bit_for_bit(tmp_path, share, estimator):
    teacher, start, file = Net(1).eval(), quantized(Net(2)), tmp_path / "folder" / "checkpoint.safetensors"
    options = {**EVERYTHING, "estimator": estimator}
    score = Watch(score=lambda network: float(torch.rand(())))  # a score may use random numbers
    straight = training(teacher, **options).run(start, score)
    with pytest.raises(Killed):
        training(teacher, checkpoint=file, **options).run(start, kill_at(share))
    torch.manual_seed(99)
    records = []
    continued = training(teacher, checkpoint=file, **options).run(start, replace(score, epoch=records.append))
    assert same(straight.network, continued.network)
    assert [replace(r, seconds=0) for r in straight.epochs] == [replace(r, seconds=0) for r in records]
    assert [record.epoch for record in records] == [1, 2, 3, 4]


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.safetensors"
    straight = training().run(Net())
    written = []

    def replace_once(draft, path):
        if written:
            raise Killed
        written.append(path)
        draft.rename(path)

    monkeypatch.setattr("secateur.envs.training.checkpoint.os.replace", replace_once)
    with pytest.raises(Killed):
        training(checkpoint=file).run(Net())
    monkeypatch.undo()
    assert same(training(checkpoint=file).run(Net()).network, straight.network)


def test_a_finished_training_is_not_done_again(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    first = training(checkpoint=file).run(Net())
    again = training(checkpoint=file).run(Net(), Watch(batch=lambda progress: pytest.fail("it trains")))
    assert same(first.network, again.network) and first.epochs == again.epochs


@pytest.mark.parametrize(
    ("changes", "what"), [({"identity": {"policy": [2]}}, "policy"), ({"epochs": 5}, "recipe"), ({"identity": {}}, "policy")]
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, changes, what):
    file = tmp_path / "checkpoint.safetensors"
    training(checkpoint=file, identity={"policy": [1]}).run(Net())
    with pytest.raises(InputError, match=f"another training: its {what} differs. Remove it"):
        training(checkpoint=file, **{"identity": {"policy": [1]}, **changes}).run(Net())


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    training(checkpoint=file).run(Net())
    with pytest.raises(InputError, match="checkpoint of another network: .* Remove it"):
        training(checkpoint=file).run(Net(width=5))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    training(checkpoint=file).run(Net())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged: .* Remove it"):
        training(checkpoint=file).run(Net())


# ---------------------------------------------------------------------------------------------------------------- NaN


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_training_stops_at_nan_with_the_epoch_before(tmp_path, broken):
    file, left = tmp_path / "checkpoint.safetensors", [4]  # three batches per epoch: the second epoch breaks

    class Breaking(Net):
        def forward(self, x):
            if self.training:
                left[0] -= 1
                if left[0] == -1 and broken == "weight":
                    self.steps += torch.nan
            return super().forward(x) * (torch.nan if left[0] == -1 and broken == "loss" else 1)

    stopped = training(checkpoint=file).run(Breaking())
    assert stopped.note.count(".") == 2 and "in epoch 2: training stopped, and the network is that of epoch 1" in stopped.note
    assert [record.epoch for record in stopped.epochs] == [1]
    left[0] = 100
    with pytest.raises(Killed):
        training(checkpoint=tmp_path / "other").run(Breaking(), Watch(batch=kill_at(0.5).batch))
    left[0] = 100
    again = training(checkpoint=file).run(Breaking(), Watch(batch=lambda progress: pytest.fail("it trains")))
    assert same(again.network, stopped.network) and again.note == stopped.note
    assert all(x.isfinite().all() for x in tensors(stopped.network).values())


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_has_shares_and_time_left():
    shown, records = [], []
    training(epochs=2).run(Net(), Watch(batch=shown.append, epoch=records.append, score=lambda network: 0.5))
    assert [one.epoch for one in shown] == [1, 1, 1, 2, 2, 2] and shown[-1].done == 1 and shown[-1].seconds_left == 0
    assert [one.done for one in shown] == pytest.approx(np.arange(1, 7) / 6) and min(one.seconds_left for one in shown[:-1]) > 0
    assert [(one.epoch, one.score) for one in records] == [(1, 0.5), (2, 0.5)]
    assert records[0].learning_rate > records[1].learning_rate == pytest.approx(0, abs=1e-9)


def test_scores_are_those_of_a_network_in_eval_mode():
    modes = []
    training(epochs=1).run(Net(), Watch(score=lambda network: modes.append(network.training) or 0.0))
    assert modes == [False]


# ---------------------------------------------------------------------------------------------------- quantized weights


def test_quantized_weights_train_on_their_grids():
    start = quantized(Net())
    names, grids = list(start.state_dict()), [quantized_weight(layer) for layer in (start.conv, start.linear)]
    trained = training(Net(3).eval(), epochs=4, learning_rate=0.1).run(start).network
    assert list(trained.state_dict()) == names
    for layer, grid in zip((trained.conv, trained.linear), grids, strict=True):
        found = quantized_weight(layer)  # it fails if the weight is not exactly that of its codes
        assert torch.equal(found.scale, grid.scale) and not torch.equal(found.codes, grid.codes)
    assert not torch.equal(trained.norm.weight, start.norm.weight)
    assert same(start, quantized(Net())), "the start is left alone"


def test_a_copy_can_be_quantized_while_the_training_goes_on():
    network = quantized(Net())
    make_trainable(network)
    copied, x = copy.deepcopy(network).eval(), torch.randn(2, 3, 8, 8)
    make_quantized(copied)
    assert list(copied.state_dict()) == list(quantized(Net()).state_dict())
    assert torch.equal(copied(x), network.eval()(x)) and network.conv.weight.requires_grad


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_grid_keeps_its_own_values_and_takes_the_nearest_of_others(name, bits):
    config, quantizer = QUANTIZERS[name]
    torch.manual_seed(0)
    layer = nn.Linear(12, 3)
    with torch.no_grad():
        layer.weight[1] = 0  # a channel of zeros has no scale
    found = quantizer(config()).quantize_weight(layer.weight.detach(), bits)
    rounding = StraightThrough(found)
    assert torch.equal(rounding(found.dequantize()), found.dequantize())
    master = nn.Parameter(2 * torch.randn(3, 12) * found.scale[:, None])
    rounded = rounding(master)
    rounded.sum().backward()
    assert torch.equal(master.grad, torch.ones(3, 12)), "also outside the range"
    codes = torch.arange(-(2 ** (bits - 1)) + (found.levels is None), 2 ** (bits - 1))
    levels = codes.float() if found.levels is None else found.levels
    distances = (levels * found.scale[:, None, None] - master.detach()[..., None]).abs().amin(-1)
    torch.testing.assert_close((rounded - master).abs().detach(), distances)


def test_regression_is_trained(tmp_path):
    torch.manual_seed(0)
    inputs, weight = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32), np.ones((4, 1), np.float32)
    split = Split(inputs, inputs @ weight)
    data = replace(DATA, calibration=split, validation=split, test=split, train=split, num_classes=0, classes=(), mean=(), std=())
    found = training(None, labeled_samples(data, split), Regression(data), distillation=0.0, epochs=20, learning_rate=0.1).run(
        nn.Linear(4, 1)
    )
    assert found.epochs[-1].loss < 0.1 * found.epochs[0].loss
