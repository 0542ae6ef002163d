"""Arguments of any kind: by keyword, in dicts and lists, beside constants; loaders that hold them by name."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.cost_models.core import InputError
from secateur.envs.inputs import Arguments, Positional, Signature, call_model, positional, signature_of
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import slice_model
from secateur.envs.tasks.functions import example_inputs, read_loader

IMAGES, VECTORS = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 240).view(48, 5)


class FromDict(nn.Module):
    """Takes a dict and gives a dict; an option is a keyword only, and another one comes before the tensor that is used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.vector, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(5, 12), nn.Linear(12, 3)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, batch, gain=1.0, mask=None, *, vector=None, power=1):
        found = torch.relu(self.image(batch["image"])).mean((2, 3))
        if mask is not None:
            found = found * mask.mean(1, keepdim=True)
        if vector is not None:
            found = found + torch.relu(self.vector(vector))
        return {"scores": gain * self.head(found) ** power + self.bias, "size": len(batch)}


EXAMPLE = {"batch": {"image": IMAGES[:1]}, "mask": VECTORS[:1], "vector": VECTORS[:1], "power": 2}


def expected(model, count=48):
    with torch.no_grad():
        return model({"image": IMAGES[:count]}, mask=VECTORS[:count], vector=VECTORS[:count], power=2)["scores"]


def test_a_call_is_kept_with_its_constants_and_goes_through_json():
    model, example = FromDict(), example_inputs(FromDict(), EXAMPLE)
    assert isinstance(example, Arguments) and len(example.tensors) == 3
    whole = Arguments((IMAGES, VECTORS, VECTORS), example.signature)
    torch.testing.assert_close(call_model(model, whole)["scores"], expected(model))
    assert [len(part) for part in whole.split(20)] == [20, 20, 8] and whole[:3].signature == example.signature
    again = Signature.read(json.loads(json.dumps(example.signature.document())))
    torch.testing.assert_close(call_model(model, Arguments(whole.tensors, again))["scores"], expected(model))
    assert signature_of(example_inputs(FromDict(), ({"image": IMAGES},))).count == 1


def test_tensors_by_position_need_no_signature():
    class Plain(nn.Module):
        def forward(self, a, b, c=1):
            return a

    assert signature_of(example_inputs(Plain(), {"b": VECTORS, "a": IMAGES})) is None
    assert torch.equal(example_inputs(Plain(), {"b": VECTORS, "a": IMAGES}).tensors[0], IMAGES[:1]), "in the order of forward"
    assert signature_of(example_inputs(Plain(), (IMAGES, VECTORS, 3))) is not None


def test_the_positional_module_is_the_module_itself_under_the_same_names():
    model, example = FromDict().eval(), example_inputs(FromDict(), EXAMPLE)
    traced = positional(model, example)
    assert isinstance(traced, Positional) and list(traced.state_dict()) == list(model.state_dict())
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(other(IMAGES, VECTORS, VECTORS)["scores"], expected(model))
        for parameter in other.head.parameters():
            nn.init.zeros_(parameter)
        assert not other(IMAGES, VECTORS, VECTORS)["scores"].any() and model.head.weight.any(), "a copy of the whole"
    graph = analyze(traced, example.tensors)
    assert {group.name for group in graph.groups} and {layer.name for layer in graph.geometry.layers} == {
        "image",
        "vector",
        "head",
    }
    assert not graph.groups[0].name.startswith("called")
    kept = [np.arange(group.units // 2) for group in graph.groups]
    assert slice_model(model, graph, kept)({"image": IMAGES})["scores"].shape == (48, 3), "the plan is that of the module"


@pytest.mark.parametrize(
    ("item", "targets"),
    [
        (({"image": IMAGES}, VECTORS, VECTORS, "y"), "y"),
        ((({"image": IMAGES}, VECTORS, VECTORS), "y"), "y"),
        (({"image": IMAGES, "label": 3}, VECTORS, VECTORS), None),
        ({"batch": {"image": IMAGES}, "mask": VECTORS, "vector": VECTORS, "label": "y"}, {"label": "y"}),
        (({"vector": VECTORS, "batch": {"image": IMAGES}, "mask": VECTORS}, "y"), "y"),
    ],
)
def test_loaders_hold_inputs_by_name_or_in_order(item, targets):
    model, example = FromDict(), example_inputs(FromDict(), EXAMPLE)
    (batch,) = read_loader([item], example, 100, ["batch", "gain", "mask", "vector", "power"])
    assert batch.targets == targets
    torch.testing.assert_close(call_model(model, batch.inputs)["scores"], expected(model))


def test_loaders_that_lack_a_tensor_are_refused():
    example = example_inputs(FromDict(), EXAMPLE)
    for item in ({"batch": {"image": IMAGES}, "mask": VECTORS}, ({"picture": IMAGES}, VECTORS, VECTORS), torch.arange(48), ()):
        with pytest.raises(InputError, match="must yield inputs like the example"):
            read_loader([item], example, 100, ["batch", "gain", "mask", "vector", "power"])


def test_a_search_of_a_model_that_takes_a_dict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = FromDict().eval()
    wanted = expected(model)
    run = secateur.search(
        model,
        inputs=EXAMPLE,
        calibration=[{"vector": VECTORS, "mask": VECTORS, "batch": {"image": IMAGES}, "label": torch.zeros(48)}],
        # The order of keywords is another one than in the example.
        evaluate=lambda m: (m(vector=VECTORS, power=2, mask=VECTORS, batch={"image": IMAGES})["scores"] - wanted).square().mean(),
        metric=secateur.Metric("error", higher_is_better=False, best=0.0),
        budgets={"half": {"macs": "<= 60%"}},
        agent="uniform",
        evaluations=1,
        workers=0,
    )
    best = run.best()
    assert best.verified, run.document["budgets"]["half"]["check"]
    small = best.model()
    assert type(small) is FromDict and small.image.out_channels < 12
    found = expected(small)
    assert float((found - wanted).square().mean()) == pytest.approx(best.validation_score, rel=1e-4)
    (exported,) = run.export(budget="half", pt2=True, output=tmp_path / "with_pt2")
    text = (exported.folder / "README.md").read_text()
    assert (
        "model({'image': x0}, 1.0, x1, vector=x2, power=2)" in text or "model({'image': x0}, mask=x1, vector=x2, power=2)" in text
    )
    program = torch.export.load(exported.folder / "model.pt2").module()
    torch.testing.assert_close(program(IMAGES, VECTORS, VECTORS)["scores"], found)
    again = secateur.load_compressed(exported.folder, model)
    torch.testing.assert_close(expected(again), found)
