"""Parts of a model: compressed alone under their own names, scored inside the whole."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.parts import Parts, capture, sampled_loss, take_parts, whole_with
from secateur.envs.tasks.core import all_samples, first_inputs, relative_error
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
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x.mean((2, 3))).repeat(1, 2)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (["neck"], "`model.part: neck` is no submodule of Unused. It has used, unused"),
        ([""], "is no submodule"),
        (["unused"], "the model never calls it"),
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


class Pyramid(nn.Module):
    """A head that is shared by two levels, then answers that depend on values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = Backbone(), SharedHead()

    def forward(self, x):
        levels = self.backbone(x)
        scores = self.head(levels["fine"][:, :16], 1) + self.head(levels["coarse"][:, :16], gain=2)
        return scores if float(scores.detach().max()) > -1e9 else -scores


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Conv2d(16, 20, 3, padding=1), nn.Conv2d(20, 6, 1)

    def forward(self, x, gain):
        return gain * self.out(torch.relu(self.mix(x))).mean((2, 3))


def test_a_part_is_called_as_often_as_the_whole_calls_it():
    whole = Pyramid().eval()
    task, parts = take_parts(classification(IMAGES, LABELS, 6), whole, ["head"])
    (inputs,) = first_inputs(task, "validation", 48)
    assert [tuple(x.shape[1:]) for x in inputs.tensors] == [(16, 8, 8), (16, 4, 4)]
    with torch.no_grad():
        outputs = parts(*inputs)["head"]
    order = torch.cat([batch.inputs for batch in classification(IMAGES, LABELS, 6).batches("validation")])
    torch.testing.assert_close(sum(outputs), whole(order))
    layers = analyze(parts, tuple(x[:1] for x in inputs.tensors)).geometry
    macs = layers.shapes(None, *(np.full(2, 32),) * 2)
    positions = 8 * 8 + 4 * 4
    assert COST_MODELS["macs"]().total(macs)[0] == positions * (16 * 20 * 9 + 20 * 6), "both calls are counted"


def test_calls_whose_number_depends_on_the_data_are_refused():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(3, 3)

        def forward(self, x):
            x = x.mean((2, 3))
            for _ in range(1 + int(float(x[0, 0]) > 0.5)):
                x = self.step(x)
            return x.repeat(1, 2)

    images = torch.cat([torch.zeros(8, 3, 8, 8), torch.ones(8, 3, 8, 8)])
    whole = Loop().eval()
    _, parts = take_parts(classification(images[:8], LABELS[:8], 6), whole, ["step"])
    with pytest.raises(InputError, match="calls it 1 times for one batch and 2 times for another; the number of calls"):
        capture(whole, parts.signatures, images[8:])


def searched(whole, part, tmp_path, monkeypatch, **objects):
    monkeypatch.chdir(tmp_path)
    wanted = whole(IMAGES[:24]).detach()
    return secateur.search(
        whole,
        inputs=IMAGES[:1],
        calibration=objects.pop("calibration", [IMAGES]),
        evaluate=lambda m: float((m(IMAGES[:24]) - wanted).square().mean()),
        metric=secateur.Metric("error", higher_is_better=False, best=0.0),
        part=part,
        budgets={"half": {"macs": "<= 70%"}},
        agent="uniform",
        evaluations=1,
        workers=0,
        **objects,
    )


def test_a_shared_head_is_compressed_exported_and_verified_in_the_whole(tmp_path, monkeypatch):
    run = searched(Pyramid().eval(), "head", tmp_path, monkeypatch, importance="taylor")
    assert run.best().verified, run.document["budgets"]["half"]["check"]
    small = run.best().model()
    assert small.head.mix.out_channels < 20 and small.backbone.first.out_channels == 16


class Regions(nn.Module):
    """A head for regions: how many there are depends on the values of the image, as in Faster R-CNN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        regions = self.backbone(x).permute(0, 2, 3, 1)[:, :4].flatten(0, 2)
        chosen = regions[: len(x) * 32 - int(float(regions[0, 0].detach()) > 0)]
        return self.head(chosen).mean(0, keepdim=True)


def test_a_head_for_regions_is_compressed_alone(tmp_path, monkeypatch):
    whole = Regions().eval()
    with pytest.raises(InputError, match="the first axes of the inputs differ .* such as a head for regions, can be named alone"):
        take_parts(classification(IMAGES, LABELS, 6), whole, ["backbone", "head"])
    run = searched(whole, "head", tmp_path, monkeypatch, importance="taylor")
    assert run.best().verified and run.best().model().head[0].out_features < 16


# ------------------------------------------------------------------------------------------------------------------ loss


def test_the_loss_of_the_whole_reaches_the_parts(detector):
    """Its gradients are those of the whole model, and nothing else gets a gradient."""
    whole_task = classification(IMAGES, LABELS, 6)
    split = whole_task.data.splits["test"]
    whole_task = replace(whole_task, data=replace(whole_task.data, calibration=split))
    task, parts = take_parts(whole_task, detector, ["inner.backbone"])
    batch = next(iter(task.batches("calibration")))
    other = Parts(Detector(), parts.signatures)  # as an importance has it: a copy
    task.loss(other, batch).backward()
    inputs, targets = all_samples(task.task, "calibration")
    assert all(p.grad is None and p.requires_grad for p in detector.parameters())
    nn.functional.cross_entropy(detector(inputs[batch.targets]), targets[batch.targets]).backward()
    for found, wanted in zip(other.parameters(), detector.inner.backbone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_a_users_loss_ranks_the_channels_of_a_part(detector, tmp_path, monkeypatch):
    """The loss looks at the first answer only, so channels that other answers need are worth nothing."""
    with torch.no_grad():
        detector.head.out.weight[0, 10:] = 0
    seen = []

    def loss(model, batch):
        seen.append((type(model).__name__, len(batch.inputs), batch.targets.shape))
        return model(batch.inputs)[:, 0].square().mean()

    run = searched(detector, "head", tmp_path, monkeypatch, loss=loss, importance="taylor", calibration=[(IMAGES, LABELS)])
    assert seen and seen[0] == ("Detector", 32, (32,))
    kept = json.loads((run.best().folder / "policy.json").read_text())["groups"][0]["kept"]
    assert 5 < len(kept) < 20 and set(kept[:10]) >= set(range(min(10, len(kept))))


def test_without_a_loss_the_growth_of_the_error_is_estimated():
    """Outputs are linear in the weights of the last layer, so the expansion is exact."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(64, 5)
    reference = layer(x).detach()
    estimates = torch.zeros(5)
    for seed in range(400):
        layer.zero_grad()
        sampled_loss({"scores": layer(x)}, seed).backward()
        estimates += (layer.weight * layer.weight.grad).sum(0).detach() ** 2 / 400
    with torch.no_grad():
        wanted = []
        for unit in range(5):
            pruned = x * (torch.arange(5) != unit)
            wanted.append(float(relative_error({"scores": reference}, {"scores": layer(pruned)}).mean()))
    torch.testing.assert_close(estimates, torch.tensor(wanted), rtol=0.35, atol=0)
