"""Files of runs and exports may name the user's own functions; other functions are called only if the user names them."""

import json

import pytest

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import import_object, is_own_code
from secateur.envs.tasks.models import find_factory, is_model_factory
from secateur.search.named_code import check_data_name, load_own_manifest

OWN = """
from shutil import rmtree
from torchvision.models import mobilenet_v3_small
def make(): return mobilenet_v3_small(num_classes=10)
def data(**arguments): raise ValueError("called")
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
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("own_network:make", True),
        ("own_network:rmtree", False),
        ("own_network:mobilenet_v3_small", False),
        ("os:system", False),
        ("os:makedirs", False),
        ("numpy:load", False),
        ("torch:load", False),
        ("secateur.search.export.write:export_point", False),
    ],
)
def test_only_files_of_the_user_are_own_code(name, own):
    assert is_own_code(import_object(name, "a test")[1]) is own


def test_a_factory_needs_no_class_beside_it():
    assert is_model_factory(find_factory("own_network:make")[0])


def write_run(folder, **changes):
    config = {**CONFIG, **changes}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "config": config}))
    return folder


def test_a_manifest_may_name_own_functions(tmp_path):
    assert load_own_manifest(write_run(tmp_path))[0].model.factory == "own_network:make"


@pytest.mark.parametrize(
    ("section", "key", "name"),
    [("model", "factory", "shutil:rmtree"), ("model", "factory", "os:system"), ("data", "name", "os:system")],
)
def test_a_manifest_cannot_make_other_functions_run(section, key, name, tmp_path):
    run = write_run(tmp_path, **{section: {**CONFIG[section], key: name}})
    with pytest.raises(InputError, match=f"manifest.json names `{name}`.* not called") as refused:
        load_own_manifest(run)
    assert f"--set {section}.{key}={name}" in refused.value.command
    for overrides in ({f"{section}.{key}": name}, {section: {**CONFIG[section], key: name}}):
        load_own_manifest(run, overrides)  # now the user has named it


def test_known_data_sets_are_no_functions():
    check_data_name("digits", (), "policy.json")
    check_data_name("secateur.envs.tasks.synthetic:load", (), "policy.json")  # the name of version 0.1
