"""Parts of a model: compressed alone under their own names, scored inside the whole."""

import pickle

import pytest
import torch
from torch import nn

import secateur
from secateur.cost_models.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.parts import Parts, take_parts, whole_with
from secateur.envs.tasks.core import first_inputs
from tests.scoring import classification


class Detector(nn.Module):
    """Its answer depends on values, so it cannot be traced; backbone and head can. The head takes a list and an option."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Module()
        self.inner.backbone = Backbone()
        self.head = Head()

    def forward(self, x):
        scores = self.head(list(self.inner.backbone(x).values()), gain=2.0)
        return torch.stack([row if float(row.detach().max()) > -1e9 else -row for row in scores])  # as a selection of boxes would


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1)

    def forward(self, x):
        fine = torch.relu(self.middle(torch.relu(self.first(x))))
        return {"fine": fine, "coarse": torch.relu(self.second(fine))}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(40, 20), nn.Linear(20, 6)

    def forward(self, features, gain):
        pooled = torch.cat([x.mean((2, 3)) for x in features], dim=1)
        return gain * self.out(torch.relu(self.mix(pooled)))


IMAGES, LABELS = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(48) % 6


@pytest.fixture
def detector():
    return Detector().eval()


def test_the_parts_alone_compute_what_they_compute_inside(detector):
    task, parts = take_parts(classification(IMAGES, LABELS, 6), detector, ["inner.backbone", "head"])
    (inputs,) = first_inputs(task, "validation", 48)
    with torch.no_grad():
        outputs = parts(*inputs)
    assert list(outputs) == ["inner.backbone", "head"] and len(inputs) == 48 and len(inputs.tensors) == 3
    order = [image for batch in classification(IMAGES, LABELS, 6).batches("validation") for image in batch.inputs]
    torch.testing.assert_close(outputs["head"], detector(torch.stack(order)))
    graph = analyze(parts, tuple(x[:1] for x in inputs.tensors))
    assert {layer.name for layer in graph.geometry.layers} == {
        "inner.backbone.first", "inner.backbone.middle", "inner.backbone.second", "head.mix", "head.out",
    }  # fmt: skip
    assert graph.groups, "the inner widths of the parts can be pruned"
    with pytest.raises(InputError, match="cannot be traced|data-dependent"):
        analyze(detector, (IMAGES[:1],))


def test_the_whole_is_scored_with_the_parts_in_it_and_is_left_as_it_was(detector):
    task, parts = take_parts(classification(IMAGES, detector(IMAGES).argmax(1), 6), detector, ["inner.backbone"])
    assert task.evaluate(parts, "validation").score == 1
    other = Parts(Detector(), parts.signatures)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    before, backbone = task.evaluate(other, "test").score, detector.inner.backbone
    assert before < 1 and detector.inner.backbone is backbone and task.evaluate(parts, "test").score == 1
    assert not whole_with(task, other).inner.backbone.first.weight.any()
    with pytest.raises(ZeroDivisionError), task.inserted(other):
        1 / 0  # noqa: B018
    assert detector.inner.backbone is backbone
    again = pickle.loads(pickle.dumps((task, parts)))
    assert again[0].evaluate(again[1], "test").score == 1 and again[0].whole.inner.backbone is again[1].inner.backbone


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.twice = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.twice(self.twice(self.used(x.mean((2, 3))))).repeat(1, 2)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (["neck"], "`model.part: neck` is no submodule of Unused. It has used, unused, twice"),
        ([""], "is no submodule"),
        (["unused"], "the model never calls it"),
        (["twice"], "the model calls it 2 times"),
    ],
)
def test_parts_that_cannot_be_used_are_named(path, words):
    with pytest.raises(InputError, match=words):
        take_parts(classification(IMAGES, LABELS, 6), Unused().eval(), path)


def test_a_part_inside_another_is_refused(detector):
    with pytest.raises(InputError, match="inner.backbone is inside inner"):
        take_parts(classification(IMAGES, LABELS, 6), detector, ["inner", "inner.backbone"])


def test_a_search_compresses_the_part_alone_and_the_export_holds_the_whole(detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = detector(IMAGES[:24]).argmax(1)
    run = secateur.search(
        detector,
        inputs=IMAGES[:1],
        calibration=[IMAGES],
        evaluate=lambda m: float((m(IMAGES[:24]).argmax(1) == wanted).float().mean()),
        metric=secateur.Metric("agreement", unit="%", worst=0.0, best=1.0),
        part=["inner.backbone", "head"],
        budgets={"half": {"macs": "<= 70%"}},
        agent="uniform",
        evaluations=2,
        workers=0,
    )
    best = run.best()
    assert best.verified, run.document["budgets"]["half"]["check"]
    small = best.model()
    assert type(small) is Detector and small.inner.backbone.first.out_channels < 16
    assert {name.partition("/")[2] for name in best.choices} == {"inner.backbone.first", "head.mix"}
    assert float((small(IMAGES[:24]).argmax(1) == wanted).float().mean()) == pytest.approx(best.validation_score)
