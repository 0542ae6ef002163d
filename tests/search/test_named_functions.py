"""A task of functions by name in a configuration: it searches as with Python objects, and other processes can go on with it."""

import subprocess
import sys

import pytest
import torch
import yaml

import secateur
from secateur.envs.core import InputError
from secateur.search.named_code import load_own_manifest

OWN = """
import torch
from torch import nn
from secateur import Metric

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.vector, self.head = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, image, vector):
        return self.head(torch.relu(self.image(image).mean((2, 3)) + self.vector(vector)))

IMAGES, VECTORS = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 480).view(96, 5)
EXAMPLE = IMAGES[:1], VECTORS[:1]
WANTED = Net().eval()(IMAGES, VECTORS).detach()
METRIC = Metric("error", higher_is_better=False, best=0.0)

def loader():
    return [(IMAGES[i : i + 32], VECTORS[i : i + 32], WANTED[i : i + 32]) for i in (0, 32, 64)]

def error(model, start=0, stop=48):
    return (model(IMAGES[start:stop], VECTORS[start:stop]) - WANTED[start:stop]).square().mean().sqrt()

def test_error(model):
    return error(model, 48, 96)

def squared(reference, outputs):
    return (reference - outputs).square().mean(1)

def loss(model, batch):
    return nn.functional.mse_loss(model(*batch.inputs), batch.targets + 1)

def raises(*arguments):
    raise KeyError("no such image")
"""
TASK = {name: f"own_task:{name}" for name in ("calibration", "evaluate", "test", "metric", "inputs", "loss")} | {
    "calibration": "own_task:loader",
    "evaluate": "own_task:error",
    "test": "own_task:test_error",
    "metric": {"name": "error", "higher_is_better": False, "best": 0.0},
    "inputs": "own_task:EXAMPLE",
}
CONFIG = {
    "model": {"factory": "own_task:Net", "input": [1, 8, 8]},
    "task": TASK,
    "budgets": {"half": {"macs": "<= 60%", "error_drop": "<= 100"}},
    "search": {"agent": "random", "evaluations": 3, "workers": 0},
    "importance": "taylor",
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working directory, which holds the functions."""
    path = tmp_path_factory.mktemp("named")
    (path / "own_task.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(path)
        yield path


@pytest.fixture(scope="module")
def run(folder):
    (folder / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    return secateur.search("own.yaml")


def test_names_do_what_objects_do(run):
    import own_task

    given = {name: CONFIG[name] for name in ("budgets", "importance")}
    objects = secateur.search(
        own_task.Net(), inputs=own_task.EXAMPLE, calibration=own_task.loader(), evaluate=own_task.error, test=own_task.test_error,
        metric=own_task.METRIC, loss=own_task.loss, **given, **CONFIG["search"],
    )  # fmt: skip
    named, passed = (one.best("half") for one in (run, objects))
    assert named.verified and (named.validation_score, named.test_score) == (passed.validation_score, passed.test_score)
    assert named.validation_score != named.test_score and named.choices == passed.choices
    assert run.given is None, "the winner was verified by a process that has nothing but names"


def test_a_fresh_process_resumes_exports_and_verifies(run):
    program = f"""
import secateur
run = secateur.resume({str(run)!r}, {{"search.evaluations": 4, "finalize.verify": False}}, trust=["own_task"])
(one,) = run.export(trial=0)
verified = secateur.verify(one.folder, seconds=0.01, trust=["own_task"])
print(len(run.trials), verified.passed, type(secateur.load_compressed(one.folder, trust=["own_task"])).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "True", "Net"]


def test_without_evaluate_the_dense_weights_are_found_again(folder):
    """The score is the divergence from a model whose weights are in a file, which only its path leads to."""
    import own_task

    trained = own_task.Net()
    torch.nn.init.normal_(trained.head.weight, generator=torch.Generator().manual_seed(5))
    torch.save(trained.state_dict(), folder / "trained.pt")
    task = {name: TASK[name] for name in ("calibration", "inputs")} | {"divergence": "own_task:squared", "samples": 64}
    config = {**CONFIG, "task": task, "budgets": {"half": {"macs": "<= 60%"}}, "importance": "l1_norm"}
    found = secateur.search(config, {"model.weights": "trained.pt"})
    assert found.best().verified, found.document["budgets"]["half"]["check"]
    assert found.document["metric"]["name"] == "divergence" and found.best().validation_score > 0
    assert secateur.inspect(config).task.samples("calibration") == 32
    (folder / "trained.pt").rename(folder / "moved.pt")
    with pytest.raises(InputError, match="trained.pt"):
        secateur.verify(found.best().folder, seconds=0.01, trust=found.trust)
    moved = {"model.weights": "moved.pt"}
    assert secateur.verify(found.best().folder, seconds=0.01, overrides=moved, trust=found.trust).passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task.evaluate": "no_module:error"}, "`task.evaluate`: there is no module `no_module`"),
        ({"task.evaluate": "own_task:eror"}, "`task.evaluate`: module `own_task` has no `eror`. Did you mean `error`?"),
        ({"task.evaluate": "own_task"}, '`task.evaluate` must read "package.module:name", but got "own_task"'),
        ({"task.evaluate": "own_task:IMAGES"}, "`task.evaluate: own_task:IMAGES` must be a function, but is Tensor"),
        ({"task.evaluate": "own_task:raises"}, "`evaluate` failed for a Net: KeyError: 'no such image'"),
        ({"task.calibration": "own_task:raises"}, "`task.calibration: own_task:raises` failed without arguments: KeyError"),
        ({"task.calibration": "own_task:METRIC"}, "`calibration` must be a loader or a list of batches, but is Metric"),
        ({"task.calibration": None}, "`calibration` is missing"),
        ({"task.metric": None}, "`evaluate` needs `metric`"),
        ({"task.metric": "own_task:IMAGES"}, "`task.metric: own_task:IMAGES` must be a secateur.Metric, or return one, but"),
        ({"task.metric.higher": True}, "`metric` has no option `higher`. Known: name, higher_is_better"),
        ({"task.metric.higher_is_better": True, "task.metric.best": None}, "says that higher is better"),
        ({"task.evaluate": None}, "`test` and `metric` need `evaluate`"),
        ({"task.evalute": "own_task:error"}, "has no option `evalute`. Did you mean `evaluate`?"),
        ({"task.inputs": "own_task:METRIC"}, "`inputs` must be a tensor, a tuple of tensors, or a dict"),
        ({"model.input": [1, 9, 9]}, r"`model.input` is \[1, 9, 9\], but the first tensor of `task.inputs` has"),
        ({"data.name": "digits"}, "data.validation: is missing"),
        ({"data.name": "digits", "data.validation": 8}, "`task` names functions, which bring their own data: leave out `data`"),
        ({"model.weights": "trained"}, "needs a task with training data: name a file of weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(folder, change, words):
    before = set((folder / "runs").iterdir()) if (folder / "runs").is_dir() else set()
    with pytest.raises(InputError, match=words) as caught:
        secateur.search(CONFIG, change)
    assert len(str(caught.value).splitlines()) == 1, "one sentence"
    after = set((folder / "runs").iterdir()) if (folder / "runs").is_dir() else set()
    assert after == before, "nothing is written"


@pytest.mark.parametrize("option", ["evaluate", "calibration", "metric"])
def test_a_manifest_cannot_make_other_functions_run(run, tmp_path, option):
    text = (run.folder / "manifest.json").read_text()
    named = {"evaluate": '"own_task:error"', "calibration": '"own_task:loader"', "metric": '{"name": "error"}'}[option]
    if option == "metric":
        start = text.index('"metric": {')
        text = text[:start] + '"metric": "os:getcwd"' + text[text.index("}", start) + 1 :]
    else:
        text = text.replace(named, '"os:getcwd"', 1)
    assert "os:getcwd" in text
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json names `os:getcwd`.* importing `os` would run its code") as refused:
        load_own_manifest(tmp_path, trust=["own_task"])
    assert "--trust os" in refused.value.command
    load_own_manifest(tmp_path, trust=["own_task", "os", "posix"])
    load_own_manifest(tmp_path, trust=["own_task"], overrides={"search.seed": 1, f"task.{option}": "os:getcwd"})
