"""Searches of Python objects: any module, a loader, the user's own functions; and what cannot be used is named."""

import pytest
import torch
from torch import nn

import secateur
from secateur.envs.inputs import Arguments, call_model, concatenate
from secateur.envs.tasks.functions import example_inputs, read_loader


class TwoInputs(nn.Module):
    """An image and a vector go in; a dict comes out. It has attributes and methods of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1))
        self.vector, self.head, self.note = nn.Linear(5, 16), nn.Linear(16, 3), "mine"

    def features(self, image):
        return self.image(image).mean((2, 3))

    def forward(self, image, vector, scale=1.0):
        return {"scores": self.head(torch.relu(self.features(image) + self.vector(vector))) * scale, "scale": scale}


IMAGES, VECTORS = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 480).view(96, 5)
BATCHES = [(IMAGES[i : i + 32], VECTORS[i : i + 32], torch.zeros(32)) for i in (0, 32, 64)]
SMALL = {"budgets": {"half": {"macs": "<= 60%"}}, "agent": "greedy", "evaluations": 3, "workers": 0}
UNIFORM = {**SMALL, "agent": "uniform", "evaluations": 1}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("objects"))
        yield


@pytest.fixture(scope="module")
def model():
    return TwoInputs().eval()


def error_of(dense):
    """An evaluate function: the error against the dense model's own answers."""
    with torch.no_grad():
        answers = dense(IMAGES[:48], VECTORS[:48])["scores"]
    return lambda m: float((m(IMAGES[:48], VECTORS[:48])["scores"].detach() - answers).square().mean().sqrt())


@pytest.fixture(scope="module")
def run(model):
    metric = secateur.Metric("error", higher_is_better=False, best=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = secateur.search(
        model,
        inputs={"image": IMAGES[:1], "vector": VECTORS[:1]},
        calibration=BATCHES,
        evaluate=error_of(model),
        metric=metric,
        **{**SMALL, "budgets": {"half": {"macs": "<= 60%", "error_drop": "<= 100"}}},
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return found


def test_the_winner_is_the_users_class_with_smaller_layers(run, model):
    best = run.best("half")
    assert best.verified and best.costs["macs"] <= 0.6 * run.document["dense"]["costs"]["macs"]
    small = best.model()
    assert type(small) is TwoInputs and small.note == "mine" and list(small.state_dict()) == list(model.state_dict())
    assert small.features(IMAGES[:2]).shape == (2, 16) and small.image[0].out_channels < 12
    assert error_of(model)(small) == pytest.approx(best.validation_score, rel=1e-4)


def test_the_compressed_module_trains_on_in_a_loop_of_the_users_own(run):
    small = run.best("half").model().train()
    optimizer, losses = torch.optim.SGD(small.parameters(), 0.05), []
    target = torch.randn(32, 3, generator=torch.Generator().manual_seed(2))
    for _ in range(12):
        loss = (small(*BATCHES[0][:2])["scores"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and all(p.grad.abs().sum() > 0 for p in small.image[3].parameters())


def test_scores_carry_the_metrics_name_and_direction(run):
    assert {"validation_error", "finalist_validation_error", "test_error"} <= set(run.front.columns)
    assert "error" in run.trials.columns and run.document["metric"]["name"] == "error"
    assert run.study.directions[0].name == "MINIMIZE"
    scores = [point["validation_score"] for point in run.document["final"]["points"]]
    assert scores == sorted(scores), "the smallest error comes first"


def test_the_run_goes_on_and_exports_with_the_same_objects(run):
    longer = secateur.resume(run, {"search.evaluations": 4})
    assert len(longer.trials) >= len(run.trials) and longer.given is run.given
    (exported, *_) = run.export(front=True)
    assert exported.metric.name == "error" and (exported.folder / "model.onnx").is_file()
    text = (exported.folder / "README.md").read_text()
    assert f'load_compressed("{exported.folder.name}", dense)' in text and "x0: (N, 1, 8, 8) float32; x1: (N, 5) float32" in text


def test_another_process_is_told_what_it_needs(run):
    for use in (secateur.resume, lambda folder: secateur.load_compressed(run.best("half").folder)):
        with pytest.raises(secateur.InputError, match="(was a|were) Python objects?"):
            use(run.folder)
    with pytest.raises(secateur.InputError, match="Verify in the process that searched"):
        secateur.verify(run.best("half").folder)
    assert secateur.verify(run.best("half").folder, factory=run.given.model, task=run.given.task, seconds=0.01).passed


def test_objects_reach_ray_workers():
    model, scored = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval(), IMAGES[:16]
    wanted = model(scored).argmax(1)
    found = secateur.search(
        model,
        inputs=IMAGES[:1],
        calibration=[IMAGES],
        evaluate=lambda m: (m(scored).argmax(1) == wanted).float().mean(),  # a lambda with tensors of its own
        metric=secateur.Metric("agreement", unit="%", worst=0.0, best=1.0),
        **{**SMALL, "workers": 1, "evaluations": 2},
    )
    assert found.trials["state"].tolist() == ["COMPLETE"] * len(found.trials) and found.best().verified


def test_without_evaluate_the_divergence_is_the_score_and_needs_no_labels(model):
    found = secateur.search(model, inputs=(IMAGES[:1], VECTORS[:1]), calibration=BATCHES, **{**SMALL, "evaluations": 2})
    assert found.document["metric"]["name"] == "divergence" and found.document["dense"]["score"] == pytest.approx(0, abs=1e-9)
    assert 0 < found.best().validation_score < 1 and found.best().verified
    # Half of the 96 samples are calibration, a quarter is validation, a quarter test.
    assert found.given.task.samples("calibration") == 48


# ------------------------------------------------------------------------------------------------------------- bad input

ACCURACY = secateur.Metric("accuracy", unit="%", worst=0.0, best=1.0)


def changes_weights(m):
    m.head.weight.data += 1
    return 0.5


def changes_statistics(m):
    m.train()
    return float(m(IMAGES[:8] + 1, VECTORS[:8])["scores"].mean())


def raises(*arguments):
    raise KeyError("no such image")


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        (raises, "`evaluate` failed for a TwoInputs: KeyError: 'no such image'"),
        (lambda m: float("nan"), "`evaluate` returned nan, which is no score"),
        (lambda m: torch.zeros(3), r"must return one number, but returned a tensor of shape \(3,\)"),
        (lambda m: "0.93", "must return one number, but returned str '0.93'"),
        (lambda m: None, "must return one number, but returned NoneType None"),
        (changes_weights, "`evaluate` changes the model: `head.weight` differs after the call"),
        (changes_statistics, "`evaluate` changes the model: `image.1.running_mean` differs after the call"),
    ],
)
def test_functions_that_cannot_be_used_are_named(model, evaluate, words):
    with pytest.raises(secateur.InputError, match=words):
        secateur.search(
            TwoInputs(), inputs=(IMAGES[:1], VECTORS[:1]), calibration=BATCHES, evaluate=evaluate, metric=ACCURACY, **SMALL
        )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss": raises}, "`loss` failed for a TwoInputs: KeyError"),
        ({"loss": lambda m, batch: 1.0}, "`loss` must return one number with gradients, but returned float 1.0"),
        ({"loss": lambda m, batch: m(*batch.inputs)["scores"]}, r"with gradients, but returned a tensor of shape \(32, 3\)"),
        ({}, "A training loss is needed: pass `loss`"),
        ({"divergence": raises}, "`divergence` failed on the dense model's outputs: KeyError"),
        ({"divergence": lambda a, b: (a["scores"] - b["scores"]).mean()}, r"one finite number per sample, shape \(1,\) here"),
    ],
)
def test_losses_and_divergences_that_cannot_be_used_are_named(model, given, words):
    with pytest.raises(secateur.InputError, match=words):
        secateur.search(model, inputs=(IMAGES[:1], VECTORS[:1]), calibration=BATCHES, importance="taylor", **given, **SMALL)


def is_small(m):
    return isinstance(m, TwoInputs) and m.image[0].out_channels < 12


def test_candidates_that_cannot_be_scored_fail_alone(model):
    score, metric = error_of(model), secateur.Metric("error", higher_is_better=False, best=0.0)
    given = {"inputs": (IMAGES[:1], VECTORS[:1]), "calibration": BATCHES, "metric": metric, **UNIFORM}
    found = secateur.search(model, evaluate=lambda m: float("nan") if is_small(m) else score(m), **given)
    assert "`evaluate` returned nan" in found.trials["failure"].iloc[0] and found.document["final"]["points"] == []


def test_functions_that_fail_at_the_end_lose_nothing(model, caplog):
    """`test` fails for finalists, or for the exported file, which has none of the model's own methods."""
    score, metric = error_of(model), secateur.Metric("error", higher_is_better=False, best=0.0)
    given = {"inputs": (IMAGES[:1], VECTORS[:1]), "calibration": BATCHES, "metric": metric, **UNIFORM}
    found = secateur.search(model, evaluate=score, test=lambda m: raises(m) if is_small(m) else score(m), **given)
    assert "is no finalist: `test` failed for a TwoInputs: KeyError" in caplog.text
    assert len(found.front) and found.document["final"]["points"] == []
    own = secateur.search(model, evaluate=score, test=lambda m: float(m.features(IMAGES).mean()), **given)
    note = own.document["budgets"]["half"]["check"]["note"]
    assert "was not checked: `test` failed for a RuntimeModel: AttributeError" in note
    assert type(own.best().model()) is TwoInputs, "the export is there"


def test_a_metric_in_the_wrong_direction_is_found(model):
    wrong = secateur.Metric("error", higher_is_better=True)
    with pytest.raises(secateur.InputError, match="random weights scores .* says that higher is better"):
        secateur.search(
            model, inputs=(IMAGES[:1], VECTORS[:1]), calibration=BATCHES, evaluate=error_of(model), metric=wrong, **SMALL
        )


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "yields no batch"),
        ([torch.zeros(8, dtype=torch.long)], "must yield inputs like the example"),
        ([(IMAGES[:4],)], r"yields \(4, 1, 8, 8\) torch.float32"),
        ([(IMAGES[:4, :, :7], VECTORS[:4])], r"\(N, 1, 8, 8\) torch.float32.*yields \(4, 1, 7, 8\)"),
        (7, "must be a loader or a list of batches, but is int"),
        (map(raises, [1]), "`calibration` failed: KeyError: 'no such image'"),
    ],
)
def test_loaders_that_cannot_be_used_are_named(model, calibration, words):
    with pytest.raises(secateur.InputError, match=words):
        secateur.search(model, inputs=(IMAGES[:1], VECTORS[:1]), calibration=calibration, **SMALL)


def test_an_endless_loader_is_read_no_further():
    def endless():
        while True:
            yield IMAGES[:40]

    batches = read_loader(endless(), IMAGES[:1], 100)
    assert [len(batch.inputs) for batch in batches] == [40, 40, 20] and all(batch.targets is None for batch in batches)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "needs `inputs`"),
        ("image", "must be a tensor, a tuple of tensors, or a dict"),
        (torch.zeros(8), "first axis of every input must be the batch"),
        (
            {"vector": VECTORS[:1]},
            r"does not suit TwoInputs.forward\(image, vector, scale=1.0\): missing a required argument: 'image'",
        ),
        ({"images": IMAGES[:1]}, "does not suit TwoInputs.forward.* Pass a dict of arguments by name, or a tuple"),
        ((IMAGES[:1], {1, 2}), "arguments may also be dicts and lists of tensors, numbers and texts, but hold set"),
    ],
)
def test_example_inputs_that_cannot_be_used_are_named(model, inputs, words):
    with pytest.raises(secateur.InputError, match=words):
        secateur.search(model, inputs=inputs, calibration=BATCHES, **SMALL)


def test_a_model_that_does_not_run_on_its_inputs_is_named():
    wrong = torch.zeros(1, 3, 8, 8)
    with pytest.raises(secateur.InputError, match=r"Conv2d does not run on inputs of shape \(1, 3, 8, 8\): .* Check `inputs`"):
        secateur.search(nn.Conv2d(1, 8, 3), inputs=wrong, calibration=[torch.zeros(8, 3, 8, 8)], **SMALL)
    with pytest.raises(secateur.InputError, match="or a torch.nn.Module, but is int"):
        secateur.search(7, inputs=wrong, calibration=[wrong], **SMALL)


def test_arguments_that_do_not_go_together_are_refused(model):
    given = {"inputs": (IMAGES[:1], VECTORS[:1]), "calibration": BATCHES, **SMALL}
    with pytest.raises(secateur.InputError, match="`evaluate` needs `metric`"):
        secateur.search(model, evaluate=lambda m: 1.0, **given)
    with pytest.raises(secateur.InputError, match="cannot be called `macs`, which is a cost"):
        secateur.search(model, evaluate=error_of(model), metric=secateur.Metric("macs", higher_is_better=False), **given)
    with pytest.raises(secateur.InputError, match="need `evaluate`"):
        secateur.search(model, metric=ACCURACY, **given)
    with pytest.raises(secateur.InputError, match="`budgets` goes with a model object"):
        secateur.search("some.yaml", budgets={})


def test_several_inputs_are_cut_like_one():
    both = Arguments((IMAGES, VECTORS))
    assert len(both) == 96 and [len(part) for part in both.split(40)] == [40, 40, 16]
    assert torch.equal(concatenate(both.split(40)).tensors[1], VECTORS)
    assert call_model(lambda image, vector: (len(image), vector.shape[1]), both[:3]) == (3, 5)
    assert isinstance(example_inputs(TwoInputs(), (IMAGES, VECTORS)), Arguments)
