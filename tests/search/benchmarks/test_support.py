"""The support matrix: one small model in the suite, all of torchvision's classifiers behind the marker `matrix`."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool

import pytest

from secateur.cost_models.core import InputError
from secateur.envs.tasks.synthetic import synthetic_net
from secateur.search.benchmarks import support
from secateur.search.benchmarks.support import SupportRow, check_model, classifiers, support_matrix


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
    monkeypatch.setattr(support, "build_classifier", lambda name: (synthetic_net().eval(), 8, 1e6))
    assert check_model("small").failure is None
    monkeypatch.setattr(support, "slicing_error", lambda *arguments: 0.5)
    assert check_model("small").failure == "the sliced network differs by 5.0e-01"


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", classifiers())
def test_every_classifier_is_supported(name, tmp_path):
    (row,) = support_matrix([name], tmp_path / "SUPPORT.md")
    assert row.failure is None, row.failure
