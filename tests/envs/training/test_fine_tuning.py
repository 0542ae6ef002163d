"""Fine-tuning: it learns, it is repeatable, and it leaves the network that it starts from alone."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.core import InputError
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.data import Split, TaskData
from secateur.envs.training.fine_tuning import FineTuning, fine_tune


def task(images, labels, classes=2):
    split = Split(images, np.asarray(labels, np.int64))
    channels = images.shape[1]
    names = tuple(map(str, range(classes)))
    return TaskData(split, split, split, split, (0.5,) * channels, (0.5,) * channels, classes, names, "made up")


class Seen(nn.Module):
    """Remembers what it is shown."""

    def __init__(self):
        super().__init__()
        self.linear, self.images, self.dtypes = nn.Linear(12, 2), [], set()

    def forward(self, x):
        self.images.append(x.detach().clone())
        scores = self.linear(x.flatten(1))
        self.dtypes.add(scores.dtype)
        return scores


def shown(data, **options):
    """What a network sees in one epoch, and the network."""
    network = Seen()
    seen = fine_tune(network, data, FineTuning(**options))
    assert network.images == [], "the copy is trained"
    return torch.cat(seen.images), seen


@pytest.fixture
def unequal():
    """Images 1x3x4 of uint8, every pixel another value."""
    return task(np.arange(5 * 12, dtype=np.uint8).reshape(5, 1, 3, 4), [0, 1, 0, 1, 0])


@pytest.mark.numerics
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_learns_and_its_origin_stays(precision):
    data = synthetic.load(train=512)
    torch.manual_seed(0)
    network = synthetic.synthetic_net().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    steps = []
    config = FineTuning(epochs=6, batch_size=32, learning_rate=0.1, shift=0, flip=False, precision=precision)
    tuned = fine_tune(network, data, config, steps.append)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    images, labels = data.tensors(data.test)
    assert float((tuned(images).argmax(1) == labels).float().mean()) > 0.8
    assert not tuned.training and next(tuned.parameters()).dtype == torch.float32
    assert [step.epoch for step in steps] == [1, 2, 3, 4, 5, 6] and steps[-1].loss < steps[0].loss


def test_every_image_is_shown_once_per_epoch_normalised(unequal):
    images, _ = shown(unequal, epochs=2, shift=0, flip=False, batch_size=3)
    expected = unequal.tensors(unequal.train)[0]
    for epoch in (images[:5], images[5:]):
        assert torch.equal(epoch[epoch[:, 0, 0, 0].argsort()], expected)
    assert not torch.equal(images[:5], images[5:]), "in another order"


def test_half_of_the_images_are_mirrored(unequal):
    many = task(np.repeat(unequal.train.images[:1], 400, axis=0), [0] * 400)
    images, _ = shown(many, shift=0)
    mirrored = (images[:, 0, 0, 0] > images[:, 0, 0, 3]).float().mean()
    assert 0.4 < mirrored < 0.6
    assert torch.equal(images[images[:, 0, 0, 0].argmax()], many.tensors(many.train)[0][0].flip(2))


def test_shifted_images_are_filled_with_black(unequal):
    white = task(np.full((200, 1, 3, 4), 255, np.uint8), [0] * 200)
    white.train.images[0] = 0
    images, _ = shown(white, shift=1, flip=False, batch_size=200)
    assert set(images.unique().tolist()) == {-1.0, 1.0}
    black_columns = {tuple(row) for row in (images[:, 0] == -1).any(1).tolist()}
    assert black_columns >= {(True, False, False, False), (False, False, False, True)}


def test_the_same_seed_gives_the_same_network(unequal):
    class Dropping(Seen):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    network = Dropping()
    torch.manual_seed(1)
    first = fine_tune(network, unequal, FineTuning(seed=3))
    state = torch.get_rng_state()
    again, other = (fine_tune(network, unequal, FineTuning(seed=seed)) for seed in (3, 4))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are used up"


def test_the_learning_rate_falls_to_zero(unequal, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *rest: rates.append(self.param_groups[0]["lr"]) or step(self, *rest)
    )
    shown(unequal, epochs=4, batch_size=2, learning_rate=0.1)
    assert len(rates) == 12 and rates[0] == 0.1 and rates == sorted(rates, reverse=True) and rates[-1] < 0.005
    assert rates[6] == pytest.approx(0.05)


def test_no_batch_has_a_single_image(unequal):
    """Five images in batches of at most four: a batch norm over one pixel would fail on the last one."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2))
    assert fine_tune(network, unequal, FineTuning(batch_size=4)) is not network


def test_products_are_in_the_asked_precision(unequal):
    assert shown(unequal, precision="bfloat16")[1].dtypes == {torch.bfloat16}
    assert shown(unequal)[1].dtypes == {torch.float32}


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"batch_size": 1}, {"shift": -1}, {"learning_rate": 0.0}, {"precision": "float16"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=f"`{next(iter(options))}` of the fine-tuning must be .* but got"):
        FineTuning(**options)


def test_training_images_are_needed(unequal):
    from dataclasses import replace

    with pytest.raises(InputError, match="set `data.train`"):
        fine_tune(Seen(), replace(unequal, train=None), FineTuning())
