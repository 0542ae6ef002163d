"""The bundled tasks reach the accuracy that they promise, and their weights are trained once."""

import numpy as np
import pytest
import torch

from secateur.envs.tasks import digits, synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.training import Recipe, cached_weights, train


def top1(model, data, split):
    images, labels = data.tensors(split)
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.numerics
@pytest.mark.slow
def test_digits_network_reaches_its_accuracy(tmp_path):
    steps = []
    model = digits.trained_digits_model(tmp_path, steps.append)
    data = load_data("digits", validation=300)
    assert top1(model, data, data.test) >= 0.975
    assert steps[-1].epoch == steps[-1].epochs == len(steps)
    assert steps[-1].loss < 0.2 and steps[-1].score > 0.95


@pytest.mark.numerics
def test_digits_network_learns():
    data = load_data("digits", validation=300, train="rest")
    model = train(digits.digits_resnet(), Classification(data), Recipe(epochs=4))
    assert top1(model, data, data.test) > 0.9


@pytest.mark.numerics
def test_synthetic_task_is_learnt_and_feels_pruning():
    data = synthetic.load()
    model = train(synthetic.synthetic_net(), Classification(data), synthetic.RECIPE)
    assert top1(model, data, data.test) > 0.9
    model.conv4.weight.data[:8] = 0
    model.bn4.bias.data[:8] = 0
    assert 1 / synthetic.NUM_CLASSES < top1(model, data, data.test) < 0.85


def test_training_depends_on_its_recipe_alone():
    data = synthetic.load(train=64)
    recipe = Recipe(epochs=1)
    torch.manual_seed(0)
    first = train(synthetic.synthetic_net(), Classification(data), recipe)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    untrained = synthetic.synthetic_net()
    state = torch.get_rng_state()
    again = train(untrained, Classification(data), recipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(untrained.conv1.weight, again.conv1.weight)


def test_weights_are_cached_by_recipe_model_and_data(tmp_path):
    task = Classification(synthetic.load(train=64))
    model, recipe = synthetic.synthetic_net(4), Recipe(epochs=1)
    epochs = []
    path = cached_weights("tiny", model, task, recipe, epochs.append, tmp_path)
    assert cached_weights("tiny", model, task, recipe, epochs.append, tmp_path) == path
    assert len(epochs) == 1
    others = [
        cached_weights("tiny", synthetic.synthetic_net(6), task, recipe, None, tmp_path),
        cached_weights("tiny", model, task, Recipe(epochs=1, seed=1), None, tmp_path),
        cached_weights("tiny", model, Classification(synthetic.load(train=64, seed=5)), recipe, None, tmp_path),
    ]
    assert len({path, *others}) == 4
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])  # nothing unfinished stays behind


def test_shifted_training_images_keep_their_pixels():
    from secateur.envs.training.samples import shifted

    images = torch.arange(4 * 2 * 5 * 5, dtype=torch.float32).view(4, 2, 5, 5)
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    centres = [np.isin(moved[i, c].numpy(), images[i, c, 1:4, 1:4].numpy()).sum() for i in range(4) for c in range(2)]
    assert centres == [9] * 8  # the middle 3x3 stays inside under any shift by one
    assert not torch.equal(moved, images)
