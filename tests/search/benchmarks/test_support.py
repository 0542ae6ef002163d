"""The support matrix: one small model in the suite, all of torchvision's classifiers behind the marker `matrix`."""

from __future__ import annotations

import pytest

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.support import SupportRow, classifiers, support_matrix


def test_a_partial_run_replaces_only_its_rows(tmp_path, monkeypatch):
    rows = {"alexnet": SupportRow("alexnet", "old"), "vgg16": SupportRow("vgg16", None, 138, groups=14)}
    monkeypatch.setattr("secateur.search.benchmarks.support._in_child", lambda name: rows[name])
    output = tmp_path / "SUPPORT.md"
    support_matrix(["alexnet", "vgg16"], output)
    rows["alexnet"] = SupportRow("alexnet", None, groups=7)
    support_matrix(["alexnet"], output)
    text = output.read_text()
    assert text.count("| alexnet |") == 1 and text.count("| vgg16 |") == 1
    assert "FAIL" not in text and "2 of 2 models pass" in text


def test_unknown_names_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="no classifier 'resnet19'"):
        support_matrix(["resnet19"], tmp_path / "SUPPORT.md")
    assert not list(tmp_path.iterdir())


def test_a_small_model_passes_in_its_own_process(tmp_path):
    (row,) = support_matrix(["squeezenet1_1"], tmp_path / "SUPPORT.md")
    assert row.failure is None and row.trains and row.groups == 25
    assert row.macs == pytest.approx(row.published_macs, rel=2e-3)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", classifiers())
def test_every_classifier_is_supported(name, tmp_path):
    (row,) = support_matrix([name], tmp_path / "SUPPORT.md")
    assert row.failure is None, row.failure
