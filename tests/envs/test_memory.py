"""Batches that do not fit into memory are halved: same outputs, same training, and a note."""

import pytest
import torch
from torch import nn

from secateur.envs import memory
from secateur.envs.inputs import Arguments, ImageList
from secateur.envs.memory import EVALUATION, TRAINING, halving, memory_note, run_model
from secateur.envs.tasks.core import Batch
from secateur.envs.training.descent import Descent
from secateur.envs.training.samples import Samples


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_parts", {})


class Full(nn.Module):
    """A network on a device with room for some samples."""

    def __init__(self, room):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.room, self.sizes = nn.Linear(4, 3), room, []

    def forward(self, x, y=None):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"scores": self.layer(x), "again": [x], "constant": 2} if y is not None else self.layer(x)


X = torch.linspace(-1, 1, 44).view(11, 4)


def test_outputs_in_parts_are_those_of_the_whole(caplog):
    network, roomy = Full(3), Full(100)
    torch.testing.assert_close(run_model(network, X), roomy(X))
    assert network.sizes == [11, 6, 3, 3, 3, 2]
    found, wanted = run_model(network, Arguments((X, X))), roomy(X, X)
    assert network.sizes[6:] == [3, 3, 3, 2], "what did not fit is not tried again"
    torch.testing.assert_close(found["scores"], wanted["scores"])
    assert torch.equal(found["again"][0], X) and found["constant"] == 2
    assert "batches of the evaluation are divided into 4 parts" in caplog.text
    assert memory_note() == "The device's memory is full, so batch sizes are divided: evaluation by 4."


def test_answers_of_a_detector_are_lists_of_samples():
    def detector(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return [{"boxes": torch.full((index, 4), float(image.sum()))} for index, image in enumerate(images)]

    found = run_model(detector, ImageList((torch.arange(5.0).view(5, 1, 1, 1),)))
    assert len(found) == 5 and [len(answer["boxes"]) for answer in found] == [0, 1, 0, 1, 0]
    assert found[3]["boxes"][0, 0] == 3


def test_a_single_sample_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        run_model(Full(0), X)
    assert run_model(Full(1), X).shape == (11, 3)
    with pytest.raises(torch.OutOfMemoryError):
        halving(EVALUATION, lambda parts: Full(0)(X), most=4)


@pytest.mark.parametrize(("room", "parts"), [(7, 2), (3, 4)])
def test_training_in_parts_takes_the_same_steps(room, parts):
    def trained(network):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        descent = Descent(network, optimizer, schedule, torch.Generator().manual_seed(0))
        seen = []
        samples = Samples(11, lambda indices: Batch(X[indices], X[indices, :3]))
        loss = descent.epoch(
            samples, 11, lambda model, batch: (model(batch.inputs) - batch.targets).square().mean(), torch.float32,
            lambda outputs, batch, loss: seen.append((outputs, loss)),
        )  # fmt: skip
        return network.layer.weight, loss, seen

    weight, loss, ((outputs, again),) = trained(Full(room))
    wanted, wanted_loss, ((wanted_outputs, _),) = trained(Full(100))
    torch.testing.assert_close(weight, wanted)
    torch.testing.assert_close(outputs, wanted_outputs)
    assert loss == pytest.approx(wanted_loss) and again == pytest.approx(loss)
    assert memory._parts == {TRAINING: parts}
