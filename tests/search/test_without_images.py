"""`data.calibration: 0`: plug-ins that need no images run without any, and those that need some are named."""

from functools import cache

import pytest

from secateur.cost_models.core import InputError
from secateur.envs.tasks.data import load_data
from secateur.search.build import build_assemblers, build_model_and_graph
from secateur.search.config import load_config, parse_config
from secateur.search.inspection import inspect, report

VALUES = {
    "model": {"factory": "secateur:synthetic", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "calibration": 0, "validation": 20, "test": 40},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8]},
    "recovery": ["data_free"],
    "finalize": {"recovery": ["data_free"]},
    "budgets": {"small": {"macs": "<= 50%"}},
}


@cache
def model_and_graph():
    """Return data, model and graph, which no change of the plug-ins changes."""
    return build_model_and_graph(parse_config(VALUES, "test.yaml"), lambda text: None)


def assemblers(**changes):
    return build_assemblers(parse_config({**VALUES, **changes}, "test.yaml"), *model_and_graph())


def test_no_calibration_images_are_loaded():
    data = load_data("digits", calibration=0, validation=10, test=20)
    assert data.calibration is None and "calibration" not in data.splits and data.image_shape == (1, 8, 8)
    assert "calibration is 0 training images" in data.source


def test_the_configuration_accepts_none():
    assert parse_config(VALUES, "test.yaml").data.calibration == 0
    with pytest.raises(InputError, match="data.calibration: must be a whole number from 0 on"):
        parse_config({**VALUES, "data": {**VALUES["data"], "calibration": -1}}, "test.yaml")


@pytest.mark.parametrize("recovery", ["data_free", "df_mpc", "none"])
def test_assemblers_without_images(recovery):
    for assembler in assemblers(recovery=[recovery], finalize={"recovery": [recovery]}):
        assert assembler.calibration is None and assembler.images is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"importance": "taylor"}, "`importance: taylor`"),
        ({"recovery": ["data_free", "least_squares"]}, "the recovery `least_squares`"),
        ({"finalize": {"recovery": ["batch_norm"]}}, "the recovery `batch_norm`"),
        ({"space": {"activation_bits": [8]}}, "`space.activation_bits`"),
        (
            {"importance": "taylor", "recovery": ["batch_norm", "batch_norm"]},
            "`importance: taylor`, the recovery `batch_norm`. Set",
        ),
    ],
)
def test_what_needs_images_is_named(changes, named):
    with pytest.raises(InputError, match="`data.calibration` is 0, but") as error:
        assemblers(**changes)
    assert named in str(error.value) and "Set `data.calibration` to a number of images" in str(error.value)


class NeedsImages:
    """A quantizer that rounds with statistics."""

    needs_images = True


@pytest.mark.parametrize(("recovery", "enough"), [("data_free", True), ("df_mpc", True), ("none", False)])
def test_a_quantizer_may_use_the_statistics_that_a_recovery_makes(recovery, enough, monkeypatch):
    from secateur.search import build

    monkeypatch.setitem(build.QUANTIZERS, "uniform", (build.QUANTIZERS["uniform"][0], lambda config: NeedsImages()))
    changes = {"recovery": [recovery], "finalize": {"recovery": ["data_free"]}}
    if enough:
        assert assemblers(**changes)[0].calibration is None
    else:
        with pytest.raises(InputError, match="`quantizer: uniform`"):
            assemblers(**changes)


def test_the_inspection_has_no_line_on_a_calibration_without_images():
    lines = [line for line in report(inspect(VALUES)) if isinstance(line, str)]
    assert any(line.startswith("dense: ") for line in lines)
    assert not any(line.startswith("calibration: ") for line in lines)


def test_published_configurations_calibrate():
    assert load_config("configs/searches/resnet56_cifar10.yaml").data.calibration == 1024
