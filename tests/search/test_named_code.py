"""Files of runs and exports name functions: only those of modules that the user trusts are imported."""

import json
import subprocess
import sys

import pytest

from secateur.envs.core import InputError
from secateur.envs.tasks.trust import check_trusted, is_built_in, trusted_modules
from secateur.search.config import parse_config
from secateur.search.named_code import load_own_manifest, modules_of
from tests.search.results import recorded

OWN = """
from functools import partial
from os import system
from torchvision.models import mobilenet_v3_small
from torchvision.models import resnet18 as own_resnet
def make(): return mobilenet_v3_small(num_classes=10)
def data(**arguments): raise ValueError("called")
prepared = partial(make)
"""
CONFIG = {
    "model": {"factory": "own_network:make", "input": [3, 32, 32]},
    "data": {"name": "own_network:data", "validation": 8},
    "search": {"agent": "random", "evaluations": 1},
    "budgets": {"phone": {"macs": "<= 60%"}},
}


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(OWN)
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nmake = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_network", "hostile"):
        sys.modules.pop(name, None)


def write_run(folder, **changes):
    config = {**CONFIG, **changes}
    manifest = {
        "schema": 2,
        "config": config,
        "dense": {"score": 0.9, "images": 8, "costs": {}},
        "precision": {"dtype": "float32"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("secateur:resnet56", True),
        ("torchvision:resnet18", True),
        ("torchvision.models:resnet18", True),
        ("torchvision.models.resnet:resnet18", True),
        ("secateur.envs.tasks.synthetic:synthetic_net", True),
        ("secateur.envs.tasks.synthetic:load", True),  # data, as version 0.1 called it
        ("digits", True),
        ("torchvision.models:get_weight", False),
        ("torchvision.datasets:CIFAR10", False),
        ("torch.hub:load", False),
        ("torch:load", False),
        ("os:system", False),
        ("secateur.search.export.write:export_point", False),
        ("secateur.envs.tasks.weights:load_weights", False),
        ("secateurs:make", False),
        ("torchvision.models_of_mine:resnet18", False),
    ],
)
def test_networks_and_data_in_the_box_need_no_trust(name, expected):
    assert is_built_in(name) is expected


def test_modules_that_are_not_trusted_are_not_imported(tmp_path):
    for name in ("hostile:make", "hostile.inner:make"):
        with pytest.raises(InputError, match=r"names `hostile.*importing `hostile.*` would run its code.*trust=\[\"hostile"):
            check_trusted(name, "model.factory", "policy.json", ["own_network", "hostil"])
    assert "hostile" not in sys.modules and not (tmp_path / "executed").exists()
    check_trusted("hostile:make", "model.factory", "policy.json", ["hostile", "builtins"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(("name", "home"), [("own_network:system", "posix"), ("own_network:partial", "functools")])
def test_a_trusted_module_does_not_lend_what_it_imports(name, home):
    with pytest.raises(InputError, match=f"it is defined in `{home}`"):
        check_trusted(name, "model.factory", "manifest.json", ["own_network"])
    check_trusted(name, "model.factory", "manifest.json", ["own_network", home])


@pytest.mark.parametrize("name", ["make", "prepared", "own_resnet"])
def test_a_trusted_module_may_be_named(name):
    check_trusted(f"own_network:{name}", "model.factory", "manifest.json", ["own_network"])
    check_trusted(f"own_network:{name}", "model.factory", "manifest.json", trusted_modules([f"own_network:{name}"]))


def test_a_manifest_may_name_what_is_trusted(tmp_path):
    run = write_run(tmp_path)
    with pytest.raises(InputError, match=r"manifest.json names `own_network:make` \(`model.factory`\)") as refused:
        load_own_manifest(run)
    assert refused.value.command.endswith("say so: --trust own_network.") and "own_network" not in sys.modules
    assert load_own_manifest(run, trust=["own_network"])[0].model.factory == "own_network:make"


@pytest.mark.parametrize(
    ("section", "key", "name"),
    [("model", "factory", "shutil:rmtree"), ("model", "factory", "hostile:make"), ("data", "name", "hostile:make")],
)
def test_a_manifest_cannot_make_other_functions_run(section, key, name, tmp_path):
    run = write_run(tmp_path, **{section: {**CONFIG[section], key: name}})
    with pytest.raises(InputError, match=f"manifest.json names `{name}`"):
        load_own_manifest(run, trust=["own_network"])
    assert not (tmp_path / "executed").exists()
    trust = ["own_network"]
    for overrides in ({f"{section}.{key}": name}, {section: {**CONFIG[section], key: name}}, [f"{section}.{key}={name}"]):
        load_own_manifest(run, overrides, trust=trust)  # now the user has named it


def test_the_users_own_configuration_is_trusted():
    assert modules_of(parse_config(CONFIG, "own.yaml")) == ("own_network",)
    plain = {**CONFIG, "model": {"factory": "secateur:digits", "input": [1, 8, 8]}, "data": {"name": "digits", "validation": 8}}
    assert modules_of(parse_config(plain, "plain.yaml")) == ()


@pytest.mark.parametrize("place", ["exports", "exports/phone", "study.journal", "agent"])
def test_links_out_of_a_run_are_refused(tmp_path, place):
    run = tmp_path / "run"
    (run / place).parent.mkdir(parents=True)
    write_run(run)
    inside, outside = run / "manifest.json", tmp_path / "own_network.py"
    (run / place).symlink_to(outside)
    with pytest.raises(InputError, match=f"{place} is a link that leads out of "):
        load_own_manifest(run, trust=["own_network"])
    (run / place).unlink()
    (run / place).symlink_to(inside)
    load_own_manifest(run, trust=["own_network"])


READING = """
import subprocess
import sys
imported = []
sys.addaudithook(lambda event, arguments: imported.append(arguments[0]) if event == "import" else None)
from typer.testing import CliRunner
from secateur.search.cli import app

for arguments in (["front", RUN], ["front", RUN, "--format", "json"], ["query", RUN, "--where", "top1 > 0", "--format", "csv"]):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (arguments, done.output)
assert not {name for name in imported if name.partition(".")[0] in ("torch", "ray", "hostile", "own_network")}, "the command"

import secateur

run = secateur.load_run(RUN)
shapes = run.front.shape, run.trials.shape, run.query("top1 > 0").shape, run.document["evaluations"], run.config.model.factory
best = run.best("phone").costs
from torch import nn

nn.Module.__init__ = None  # no network can be built
assert secateur.load_run(RUN).best("phone").costs == best and len(run.study.trials) == 3
assert not {name for name in imported if name.partition(".")[0] in ("hostile", "own_network")}
print(shapes[-1])
"""


def test_verbs_that_read_import_nothing_that_a_run_names(tmp_path):
    run = recorded.write_run(tmp_path / "run", [recorded.episode(width, 0.8, width, 100.0) for width in (30, 40, 45)])
    config = {**CONFIG, "model": {**CONFIG["model"], "factory": "hostile:make"}}
    (run / "manifest.json").write_text(json.dumps({"schema": 2, "config": config}))
    program = f"RUN = {str(run)!r}\n{READING}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "hostile:make" and not (tmp_path / "executed").exists()
