"""Run folders are made once, and their manifest brings the configuration back."""

from __future__ import annotations

import json

import pytest

from secateur.envs.core import InputError
from secateur.search.config import OutputSection, parse_config
from secateur.search.run.folder import MANIFEST, create_run_folder, load_manifest, write_manifest


@pytest.fixture
def config():
    return parse_config(
        {
            "model": {"factory": "secateur:synthetic", "input": [3, 8, 8]},
            "data": {"name": "synthetic", "validation": 256},
            "budgets": {"phone": {"macs": "<= 40%", "weight_bytes": "<= 2.5kB", "top1_drop": "<= 2"}},
        },
        "small.yaml",
    )


def test_unnamed_runs_are_numbered(tmp_path):
    output = OutputSection(root=str(tmp_path / "runs"), prefix="digits")
    assert [create_run_folder(output).name for _ in range(3)] == ["digits-1", "digits-2", "digits-3"]
    (tmp_path / "runs" / "digits-2").rmdir()
    assert create_run_folder(output).name == "digits-2"


def test_a_named_run_is_never_overwritten(tmp_path):
    output = OutputSection(root=str(tmp_path), name="mine")
    assert create_run_folder(output) == tmp_path / "mine"
    with pytest.raises(InputError, match="mine exists already. Choose another `output.name`"):
        create_run_folder(output)


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="`output.root: .*runs` cannot hold runs"):
        create_run_folder(OutputSection(root=str(tmp_path / "runs")))


def test_the_manifest_brings_the_configuration_back(tmp_path, config):
    write_manifest(tmp_path, config, {"data": "synthetic: 3 images"})
    loaded, manifest = load_manifest(tmp_path)
    assert loaded == config
    assert manifest["data"] == "synthetic: 3 images" and manifest["versions"]["torch"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 9, "config": {}}', '{"schema": 1, "config": {}}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="manifest.json"):
        load_manifest(tmp_path)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match="is not a run"):
        load_manifest(tmp_path)


def test_the_manifest_is_json_that_others_can_read(tmp_path, config):
    write_manifest(tmp_path, config, {})
    values = json.loads((tmp_path / MANIFEST).read_text())["config"]
    assert values["budgets"]["phone"] == {"macs": "<= 40%", "weight_bytes": "<= 2.5kB", "top1_drop": "<= 2"}
