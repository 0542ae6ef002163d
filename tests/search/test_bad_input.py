"""Kinds of input that used to end in a traceback, or were taken without a word."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from secateur.cost_models.core import InputError
from secateur.cost_models.reading import parse_json, read_text
from secateur.envs.metric import TOP1
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.readers import decode_image, read_arrays
from secateur.search.build import absolute_budget
from secateur.search.cli import app
from secateur.search.config import BudgetConfig, load_config
from secateur.search.profiling.profile_run import profile_to_file
from secateur.search.results.document import read_front
from secateur.search.run.journal import JOURNAL, read_journal
from tests.search.results import recorded

CONFIG = {
    "model": {"factory": "secateur:digits", "input": [1, 8, 8]},
    "data": {"name": "digits", "validation": 400},
    "budgets": {"phone": {"macs": "<= 40%"}},
}
BOMB = (
    "["
    + "&a [x, x, x], "
    + ", ".join(f"&{c} [*{b}, *{b}, *{b}]" for b, c in zip("abcdefghijkl", "bcdefghijklm", strict=True))
    + "]"
)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task={options: 3}", "task.options: must be a mapping"),
        ("search.evaluations=2024-13-45", "cannot be read as timestamp"),
        ("search.evaluations=!!int abc", "cannot be read as int"),
        ("search.seed=0x_", "cannot be read as int"),
        ("search.seed=!!bool abc", "cannot be read as bool"),
        (f"search.seed={'9' * 5000}", "cannot be read as int"),
        (f"model.args={'[' * 1200}", "nested too deeply"),
        (f"model.args={BOMB}", "values, more than 20,000"),
        ("model.args=&a [*a]", "an alias stands for a value that contains it"),
        ("model.args=" + "x" * 2_000_000, "longer than 1,000,000 characters"),
        ("data.seed=-1", "data.seed: input should be greater than or equal to 0"),
        ("space.weight_bits=[]", "`space.weight_bits` has no choice: leave it out"),
        ("space.weight_bits=[4, 4]", "`space.weight_bits` names a width twice"),
        ("calibration.samples=1000000000", "must be in [1, 1e+06]"),
        (f"output.name={'n' * 300}", "at most 60 characters"),
        ("budgets={" + "n" * 300 + ": {macs: 40%}}", "at most 60 characters"),
    ],
)
def test_values_of_a_configuration(override, words):
    with pytest.raises(InputError) as error:
        load_config(CONFIG, [override])
    assert words in str(error.value) and len(str(error.value)) < 700


def test_a_long_name_of_a_configuration_is_cut(tmp_path):
    path = tmp_path / f"{'n' * 200}.yaml"
    path.write_text(json.dumps(CONFIG))
    assert load_config(path).output.prefix == "n" * 60


def test_text_files_have_limits(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 20)
    assert read_text(path, 20) == "x" * 20
    for content, most, words in ((b"x" * 21, 20, "larger than 20 bytes"), (b"\xff", 20, "no UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_text(path, most)
    for text, words in (("[" * 100_000, "nested too deeply"), ("9" * 5000, "damaged"), ("{", "line 1, column 2")):
        with pytest.raises(InputError, match=words):
            parse_json(text, "x.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("points"), "`points`: is missing"),
        (lambda d: d.update(front=["../../../ESCAPED"]), "`front.0`: input should be a valid integer"),
        (lambda d: d.update(front=[77]), "`points` has no evaluation 77"),
        (lambda d: d["budgets"].update({"../x": d["budgets"]["phone"]}), "`budgets"),
        (lambda d: d["budgets"]["phone"].update(check=CHECK | {"export": "exports/../../x"}), "`budgets.phone.check.export`"),
        (lambda d: d["dense"]["costs"].pop("macs"), "has no cost `macs`"),
        (
            lambda d: d["points"].append({**d["points"][0], "evaluation": 9, "choices": {"other": 1}}),
            "evaluation 9 has other choices",
        ),
        (lambda d: d.update(metric={"name": "../x"}), "`metric`"),
    ],
)
def test_an_edited_front_is_named(tmp_path, change, words):
    run = recorded.write_run(tmp_path / "run", [recorded.episode(width, 0.8, width, 100.0) for width in (30, 40)])
    document = json.loads((run / "front.json").read_text())
    assert read_front(run) == document
    change(document)
    (run / "front.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="front.json is damaged") as error:
        read_front(run)
    assert words in str(error.value)


CHECK = {"passed": None, "failures": [], "export": None, "note": None, "rejected": []}


def test_images_have_limits(tmp_path):
    path = tmp_path / "image.png"
    for size, words in (((1, 300), "one side is 100 times"), ((12_000, 12_000), "decompression bomb")):
        Image.new("L", size).save(path)
        with pytest.raises(InputError, match=words):
            decode_image(str(path), (3, 8, 8))


def test_labels_have_limits(tmp_path):
    np.savez(tmp_path / "data.npz", x_test=np.zeros((2, 8, 8, 3), np.uint8), y_test=np.array([0, 10**12]))
    with pytest.raises(InputError, match="labels up to 1,000,000,000,000; at most 100,000 classes"):
        read_arrays(tmp_path / "data.npz", (3, 8, 8))


def test_outputs_that_are_not_finite_have_no_score():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), synthetic.NUM_CLASSES), float("nan"))

    with pytest.raises(InputError, match="NaN or infinite values, so it has no score"):
        Classification(synthetic.load()).evaluate(Broken(), "validation")


def test_a_budget_cannot_limit_an_unknown_cost():
    with pytest.raises(InputError, match="knows no `latency_ms`, only macs"):
        absolute_budget("asked", BudgetConfig({"latency_ms": "<= 3"}), {"macs": 1.0}, TOP1)


def test_a_profile_overwrites_device_files_only(tmp_path):
    path = tmp_path / "my_search.yaml"
    path.write_text("model: {}")
    with pytest.raises(InputError, match="is there already, and is no device file"):
        profile_to_file(None, path, "onnxruntime", None, None)
    assert path.read_text() == "model: {}"


@pytest.mark.parametrize(
    "words",
    [
        "front NAME",
        "query NAME",
        "report NAME",
        "search NAME",
        "inspect NAME",
        "sweep NAME",
        "export NAME --budget phone",
        "verify NAME",
        "apply NAME --weights weights.pth",
        "resume NAME",
        "ask NAME --budget macs<=40%",
        "finalize NAME",
        "profile NAME",
        "inspect configs/searches/digits.yaml --set device=NAME",
    ],
)
@pytest.mark.parametrize("name", ["x" * 300, "no\nfile", "nothing/" * 20])
def test_a_name_that_no_file_has_is_one_sentence(words, name):
    result = CliRunner().invoke(app, [word.replace("NAME", name) for word in words.split()])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and isinstance(result.exception, SystemExit)


def test_a_study_without_objectives_is_named(tmp_path):
    run = recorded.write_run(tmp_path / "run", [])
    journal = run / JOURNAL
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])  # its process was killed at the very start
    with pytest.raises(InputError, match="does not name the objectives of its search. Search again"):
        read_journal(run)
