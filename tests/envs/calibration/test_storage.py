"""Calibrations on disk come back bit for bit, and only for what they were made of."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.calibration import CalibrationConfig, cached_calibration, storage
from secateur.envs.calibration.core import CHANNEL, DIAGONAL, FULL, NONE
from secateur.envs.model_graph import analyze

CONFIG = CalibrationConfig(max_matrix_bytes=400, samples=20)


class Doubled(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) * 2


class Kinds(nn.Module):
    """One layer of every kind under CONFIG."""

    def __init__(self):
        super().__init__()
        self.full, self.channel = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 9, 3)
        self.up, self.diagonal = Doubled(9, 9, 2), nn.Linear(9 * 25, 3)
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, x):
        return self.diagonal(self.up(self.channel(self.full(x + self.shift))).flatten(1))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model, images = Kinds().eval(), torch.randn(5, 2, 6, 6)
    return model, analyze(model, (images[:1],)), images


@pytest.fixture
def computed(monkeypatch):
    """Counts the passes."""
    calls, original = [], storage.calibrate
    monkeypatch.setattr(storage, "calibrate", lambda *given: calls.append(given) or original(*given))
    return calls


def read_twice(problem, folder, config=CONFIG):
    return [cached_calibration(*problem, config, folder) for _ in range(2)]


def assert_same(first, second):
    assert list(first.layers) == list(second.layers)
    assert (first.images, first.config) == (second.images, second.config)
    for mine, theirs in zip(first.layers.values(), second.layers.values(), strict=True):
        for a, b in zip(vars(mine).values(), vars(theirs).values(), strict=True):
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
                assert not b.flags.writeable
            else:
                assert a == b and type(a) is type(b)


def test_every_kind_comes_back_bit_for_bit(problem, tmp_path, computed):
    said = []
    first = cached_calibration(*problem, CONFIG, tmp_path / "new", said.append)
    second = cached_calibration(*problem, CONFIG, tmp_path / "new", said.append)
    assert {layer.kind for layer in first.layers.values()} == {FULL, CHANNEL, DIAGONAL, NONE}
    assert_same(first, second)
    (file,) = (tmp_path / "new").iterdir()
    assert len(computed) == 1 and said == ["calibrating", f"calibration read from {file}"]


def changed_weight(model, graph, images):
    model.full.weight = nn.Parameter(model.full.weight.detach() * 1.01)
    return model, graph, images


def changed_hidden_buffer(model, graph, images):
    model.shift = torch.ones(1)
    return model, graph, images


def changed_image(model, graph, images):
    images = images.clone()
    images[4, 0, 0, 0] += 1e-6
    return model, graph, images


def fewer_layers(model, graph, images):
    small = nn.Sequential(model.full, nn.Flatten(), nn.Linear(144, 3)).eval()
    return small, analyze(small, (images[:1],)), images


@pytest.mark.parametrize("change", [changed_weight, changed_hidden_buffer, changed_image, fewer_layers])
def test_another_network_or_other_images_are_calibrated_anew(problem, tmp_path, computed, change):
    cached_calibration(*problem, CONFIG, tmp_path)
    other = change(*problem)
    assert_same(cached_calibration(*other, CONFIG, tmp_path), storage.calibrate(*other, CONFIG))
    assert len(computed) == 3 and len(list(tmp_path.iterdir())) == 2


def test_every_option_counts(problem, tmp_path):
    for changes in ({}, {"seed": 1}, {"positions": 3}, {"samples": 7}, {"max_matrix_bytes": 10}):
        config = CalibrationConfig(**{"max_matrix_bytes": 400, **changes})
        assert cached_calibration(*problem, config, tmp_path).config == config
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "value", "foreign"])
def test_damaged_and_foreign_files_are_written_anew(problem, tmp_path, computed, caplog, damage):
    first = cached_calibration(*problem, CONFIG, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "foreign":
        cached_calibration(*problem, CalibrationConfig(), tmp_path)
        (other,) = set(tmp_path.iterdir()) - {file}
        os.replace(other, file)
    else:
        new = {
            "empty": b"",
            "cut": content[:-30],
            "header": content.replace(b"images", b"imagos"),
            "value": content[:-9] + bytes(1) + content[-8:],
        }[damage]
        file.write_bytes(new)
    computed.clear()
    with caplog.at_level(logging.WARNING, storage.__name__):
        second, third = read_twice(problem, tmp_path)
    assert "is damaged and is computed again" in caplog.text and len(caplog.records) == len(computed) == 1
    assert_same(first, second)
    assert_same(first, third)


def test_a_folder_that_cannot_be_written_costs_a_warning(problem, tmp_path, computed, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, storage.__name__):
        found = cached_calibration(*problem, CONFIG, tmp_path / "file" / "x")
    assert "cannot be stored" in caplog.text and len(caplog.records) == 1
    assert_same(found, storage.calibrate(*problem, CONFIG))


def test_a_failed_write_leaves_nothing_behind(problem, tmp_path, monkeypatch, caplog):
    def full_disk(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full_disk)
    with caplog.at_level(logging.WARNING, storage.__name__):
        cached_calibration(*problem, CONFIG, tmp_path)
    assert "No space left" in caplog.text and list(tmp_path.iterdir()) == []


def test_the_folder_stays_small_and_keeps_what_was_used_last(problem, tmp_path, monkeypatch):
    def file_of(seed):
        before = set(tmp_path.iterdir())
        cached_calibration(*problem, CalibrationConfig(samples=20, seed=seed), tmp_path)
        return (set(tmp_path.iterdir()) - before).pop()

    first, second = file_of(0), file_of(1)
    os.utime(first, (100, 100))
    os.utime(second, (200, 200))
    cached_calibration(*problem, CalibrationConfig(samples=20, seed=0), tmp_path)  # now the first was used last
    monkeypatch.setattr(storage, "MAX_FOLDER_BYTES", int(2.5 * first.stat().st_size))
    third = file_of(2)
    assert set(tmp_path.iterdir()) == {first, third}
