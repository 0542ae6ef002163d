"""The support matrix: one small model in the suite, all of torchvision's classifiers behind the marker `matrix`."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from secateur.cost_models.core import InputError
from secateur.envs.tasks.synthetic import synthetic_net
from secateur.search.benchmarks import support
from secateur.search.benchmarks.support import SupportRow, check_model, support_matrix
from secateur.search.benchmarks.support_models import CheckedModel, build_checked, classifiers, others


class Pool:
    """In place of a process pool: runs a function here."""

    function = staticmethod(lambda name: SupportRow(name, None, groups=7))

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, check, name):
        self._name = name
        return self

    def result(self):
        return type(self).function(self._name)


@pytest.fixture
def check(monkeypatch):
    """Function (function) that sets what checks a model."""
    monkeypatch.setattr(support, "ProcessPoolExecutor", Pool)
    return lambda function: monkeypatch.setattr(Pool, "function", staticmethod(function))


def test_a_partial_run_replaces_only_its_rows(tmp_path, check):
    output = tmp_path / "SUPPORT.md"
    check(lambda name: SupportRow(name, "old"))
    assert [row.model for row in support_matrix(["alexnet", "vgg16"], output)] == ["alexnet", "vgg16"]
    assert "0 of 2 models pass" in output.read_text()
    check(lambda name: SupportRow(name, None, groups=7))
    list(support_matrix(["alexnet"], output))
    text = output.read_text()
    assert text.count("| alexnet |") == 1 and "| vgg16 | FAIL: old |" in text and "1 of 2 models pass" in text


@pytest.mark.parametrize(
    ("error", "reason"),
    [(BrokenProcessPool("killed"), "the process died"), (RuntimeError("no\nway"), "RuntimeError: no")],
)
def test_a_model_that_breaks_does_not_stop_the_others(tmp_path, check, error, reason):
    def function(name):
        if name == "alexnet":
            raise error
        return SupportRow(name, None, groups=7)

    check(function)
    broken, passed = support_matrix(["alexnet", "vgg16"], tmp_path / "SUPPORT.md")
    assert broken.failure.startswith(reason) and passed.failure is None


def test_unknown_names_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="no classifier 'resnet19'"):
        next(support_matrix(["resnet19"], tmp_path / "SUPPORT.md"))
    assert not list(tmp_path.iterdir())


def test_a_small_model_passes():
    row = check_model("squeezenet1_1")
    assert row.failure is None and row.trains and row.groups == 25
    assert row.macs == pytest.approx(row.published_macs, rel=2e-3)


def test_a_model_that_slicing_changes_fails(monkeypatch):
    checked = CheckedModel(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),), 1e6)
    monkeypatch.setattr(support, "build_checked", lambda name: checked)
    assert check_model("small").failure is None
    monkeypatch.setattr(support, "slicing_error", lambda *arguments: 0.5)
    assert check_model("small").failure == "the sliced network differs by 5.0e-01"


def test_models_for_other_tasks_have_a_table_of_their_own(tmp_path, check):
    output = tmp_path / "SUPPORT.md"
    check(lambda name: SupportRow(name, None, groups=7, layers=(3, 4), onnx="1e-06"))
    list(support_matrix(["alexnet", "flow/raft_small", "segmentation/fcn_resnet50"], output))
    list(support_matrix(["vgg16"], output))
    first, second = output.read_text().split("## timm, segmentation")
    assert "2 of 2 models pass" in first and "2 of 2 models pass" in second
    assert "| flow/raft_small | ok |" in second and "| 3 of 4 |" in second and "| 1e-06 |" in second


def test_a_model_for_another_task_passes_and_is_exported(monkeypatch):
    checked = CheckedModel(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),))
    monkeypatch.setattr(support, "build_checked", lambda name: checked)
    row = check_model("segmentation/small")
    assert row.failure is None and float(row.onnx) < 1e-4 and 0 < row.pruned_macs < 1
    assert row.layers[0] == row.layers[1] > 1


def test_the_second_table_holds_torchvision_models_and_those_of_timm_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(others()) == 16 and len(build_checked("flow/raft_small").inputs) == 2
    with pytest.raises(InputError, match="needs timm"):
        next(support_matrix(["timm/vit_tiny_patch16_224"], Path("SUPPORT.md")))


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*classifiers(), *others()])
def test_every_model_is_supported(name, tmp_path):
    (row,) = support_matrix([name], tmp_path / "SUPPORT.md")
    assert row.failure is None, row.failure
