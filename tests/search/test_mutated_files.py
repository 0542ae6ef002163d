"""Files that were mutated in any way are read, or refused in one sentence: `InputError`, never another error.

The mutations are drawn by hypothesis, the same in every run. Each kind of file is read as far as its commands read it.
"""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from secateur.cost_models.core import InputError
from secateur.cost_models.device import SHIPPED, read_device
from secateur.envs.calibration.core import Calibration, CalibrationConfig, LayerStatistics
from secateur.envs.calibration.storage import load_calibration, save_calibration
from secateur.envs.tasks.readers import decode_image, read_arrays
from secateur.envs.tasks.weights import load_weights
from secateur.search.config import load_config
from secateur.search.named_code import load_own_manifest
from secateur.search.results.document import front_csv, only_budget, read_front, winner
from secateur.search.results.query import query
from secateur.search.results.selection import chosen_front
from secateur.search.results.tables import check_lines, front_tables
from secateur.search.run.journal import read_journal, trials_table
from secateur.search.run.study import load_study
from tests.search.mutations import broken, changed_bytes, changed_values, example
from tests.search.results import recorded

CONFIG = """
model: {factory: "secateur:digits", input: [1, 8, 8]}
data: {name: digits, validation: 400}
search: {agent: random, evaluations: 50, seed: 3}
space: {prune_ratio: [0.0, 0.9], weight_bits: [4, 8]}
quantizer: {name: uniform, options: {}}
recovery: [least_squares, batch_norm]
calibration: {samples: 4096}
budgets:
  phone: {macs: "<= 40%", weight_bytes: 250kB, top1_drop: 2}
finalize: {top: 2, training: {epochs: 1}}
output: {root: runs, prefix: tried}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = recorded.write_run(tmp_path_factory.mktemp("fuzz") / "run", recorded.random_episodes(12, 0))
    journal = (folder / "study.journal").read_text()  # without what differs in every run
    journal = re.sub(r'"worker_id":"[^"]*"', '"worker_id":"one"', journal)
    journal = re.sub(r'"datetime_(start|complete)":"[^"]*"', r'"datetime_\1":"2026-01-01T00:00:00.000000"', journal)
    (folder / "study.journal").write_text(journal)
    (folder / "config.yaml").write_text(CONFIG)
    config = load_config(folder / "config.yaml").model_dump(mode="json")
    dense = {"score": 0.9, "images": 500, "costs": recorded.DENSE.costs}
    manifest = {"schema": 2, "config": config, "dense": dense, "precision": {"dtype": "float32"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of the run, whose files may be changed."""
    return shutil.copytree(run, tmp_path / "run")


@example(40)
@given(st.data())
def test_configurations(damaged, data):
    path = damaged / "config.yaml"
    path.write_bytes(data.draw(changed_bytes(CONFIG.encode())))
    assert broken(lambda: load_config(path)) == ""


@example(40)
@given(st.data())
def test_values_of_configurations(run, data):
    manifest = json.loads((run / "manifest.json").read_text())
    assert broken(lambda: load_config(data.draw(changed_values(manifest["config"])))) == ""


VALUES = ("2024-13-45", "!!int abc", "!!bool x", "0x_", "9" * 5000, "[" * 1200, "&a [*a]", "!!python/name:os.system")
KEYS = ("search.evaluations", "search.seed", "model.args", "budgets.phone.macs", "data.seed", "x", "")


@example()
@given(st.data())
def test_overrides(run, data):
    texts = [
        f"{data.draw(st.sampled_from(KEYS))}={data.draw(st.sampled_from(VALUES))}",
        data.draw(st.text(max_size=30)),
        data.draw(changed_bytes(b"a.b=[1, 2]")).decode(errors="replace"),
    ]
    for text in texts:
        assert broken(lambda text=text: load_config(run / "config.yaml", [text])) == ""


def use_front(run):
    document = read_front(run)
    front_tables(document), check_lines(document), front_csv(document)
    for name in document["budgets"]:
        only_budget(document, name), winner(document, name)
    assert all(one.folder.resolve().is_relative_to(run.resolve()) for one in chosen_front(run, document))


@example(40)
@given(st.data())
def test_fronts(run, damaged, data):
    path, original = damaged / "front.json", (run / "front.json").read_bytes()
    mutated = json.dumps(data.draw(changed_values(json.loads(original)))).encode()
    path.write_bytes(data.draw(st.sampled_from((mutated, data.draw(changed_bytes(original))))))
    assert broken(lambda: use_front(damaged)) == ""


@example(30)
@given(st.data())
def test_manifests(run, damaged, data):
    path, original = damaged / "manifest.json", (run / "manifest.json").read_bytes()
    mutated = json.dumps(data.draw(changed_values(json.loads(original)))).encode()
    path.write_bytes(data.draw(st.sampled_from((mutated, data.draw(changed_bytes(original))))))
    assert broken(lambda: load_own_manifest(damaged)) == ""


@example(30)
@given(st.data())
def test_journals(run, damaged, data):
    path, original = damaged / "study.journal", (run / "study.journal").read_bytes()
    lines = original.splitlines(keepends=True)
    other = data.draw(st.sampled_from((b"", b"7\n", b'{"op_code": 99}\n', lines[-1], lines[0])))
    lines[data.draw(st.integers(0, len(lines) - 1))] = other
    path.write_bytes(data.draw(st.sampled_from((b"".join(lines), data.draw(changed_bytes(original))))))
    assert broken(lambda: trials_table(read_journal(damaged))) == ""
    assert broken(lambda: query(damaged, "top1 > 0.5 and macs < 0.5*dense", sort="-macs")) == ""
    assert broken(lambda: load_study(damaged).best_trials) == ""


PIECES = [*"( ) <= == in * / - , [ ] if else lambda . : ** ` and or not dense top1 macs budget feasible 0.5 'phone'".split(" ")]
PIECES += ["`weight_bits/conv`", "f'{1}'", "\n", "\0"]


@example(40)
@given(st.data())
def test_conditions(run, data):
    condition = " ".join(data.draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8)))
    assert broken(lambda: query(run, condition)) == ""


@example()
@given(st.data())
def test_devices(tmp_path, data):
    original = data.draw(st.sampled_from(sorted(SHIPPED.glob("*.json")))).read_bytes()
    mutated = json.dumps(data.draw(changed_values(json.loads(original)))).encode()
    path = tmp_path / "device.json"
    path.write_bytes(data.draw(st.sampled_from((mutated, data.draw(changed_bytes(original))))))
    assert broken(lambda: read_device(path).cost_models()) == ""


@example()
@given(st.data())
def test_weights(tmp_path, data):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    path = tmp_path / data.draw(st.sampled_from(("weights.safetensors", "weights.pt")))
    if path.suffix == ".pt":
        odd = (
            torch.eye(4).to_sparse(),
            torch.ones(4, device="meta"),
            torch.ones(4, dtype=torch.complex64),
            7,
            "x",
            {"a": {}},
            [],
        )
        state = dict(model.state_dict())
        state[data.draw(st.sampled_from(sorted(state)))] = data.draw(st.sampled_from(odd))
        torch.save(data.draw(st.sampled_from((state, model.state_dict(), {"model": state}))), path)
    else:
        save_file(model.state_dict(), path)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
    assert broken(lambda: load_weights(model, path)) == ""


@example()
@given(st.data())
def test_images_and_arrays(tmp_path, data):
    content = io.BytesIO()
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3) if data.draw(st.booleans()) else np.zeros((1, 400, 3), np.uint8)
    Image.fromarray(pixels).save(content, data.draw(st.sampled_from(("PNG", "JPEG", "BMP", "GIF", "TIFF"))))
    (tmp_path / "image").write_bytes(data.draw(changed_bytes(content.getvalue())))
    assert broken(lambda: decode_image(str(tmp_path / "image"), (3, 8, 8))) == ""
    content = io.BytesIO()
    labels = np.array(data.draw(st.lists(st.sampled_from((0, 1, 255, -1, 10**12)), min_size=4, max_size=4)))
    np.savez(content, x_test=np.zeros((4, 8, 8, 3), np.uint8), y_test=labels)
    mutated = data.draw(changed_bytes(content.getvalue()))
    (tmp_path / "data.npz").write_bytes(data.draw(st.sampled_from((content.getvalue(), mutated))))
    assert broken(lambda: read_arrays(tmp_path / "data.npz", (3, 8, 8))) == ""


@example()
@given(st.data())
def test_stored_calibrations(tmp_path, data):
    samples = np.ones(9, np.float32)
    layer = LayerStatistics(kind="none", moments=samples[:0], samples=samples, low=0.0, high=1.0, area=9, count=5)
    path, calibration = tmp_path / "calibration.safetensors", Calibration({"conv": layer}, 4, CalibrationConfig())
    save_calibration(calibration, path, "key")
    mutated = data.draw(changed_bytes(path.read_bytes()))
    if mutated == path.read_bytes():
        return
    path.write_bytes(mutated)
    with pytest.raises((SafetensorError, OSError, ValueError, KeyError, TypeError)):  # what the cache computes again
        load_calibration(path, "key")


def test_the_mutations_are_not_all_refused_at_the_door(run):
    """Otherwise the tests above would show nothing about what is read after the first check."""
    accepted = []

    @example()
    @given(st.data())
    def count(data):
        try:
            load_config(data.draw(changed_values(json.loads((run / "manifest.json").read_text())["config"])))
            accepted.append(True)
        except InputError:
            accepted.append(False)

    count()
    assert 0 < np.mean(accepted) < 1
