"""Tiles become the array file that the cifar10 reader reads."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from secateur.envs.tasks import convert_tiles
from secateur.envs.tasks.data import load_data


@pytest.fixture
def tiles(tmp_path):
    source = tmp_path / "tiles"
    source.mkdir()
    rng = np.random.default_rng(0)
    parts = {}
    for part in ("train", "test"):
        parts[part] = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        for index in range(2):
            tile = parts[part][4 * index : 4 * index + 4].reshape(-1, 32, 3)
            Image.fromarray(tile).save(source / f"{part}_{index:02d}.webp", lossless=True)
        np.save(source / f"{part}_labels.npy", np.arange(8, dtype=np.uint8))
    return source, parts


def test_tiles_become_what_the_reader_reads(tiles, tmp_path, capsys):
    source, parts = tiles
    target = tmp_path / "new" / "folder"
    assert convert_tiles.main([str(source), str(target)]) == 0
    assert hashlib.sha256(parts["test"].tobytes()).hexdigest() in capsys.readouterr().out
    data = load_data("cifar10", target, calibration=8, validation=3)
    assert np.array_equal(data.test.images, parts["test"][3:].transpose(0, 3, 1, 2))
    assert data.test.labels.tolist() == [3, 4, 5, 6, 7]


def test_missing_tiles_end_with_exit_code_2_and_nothing_written(tiles, tmp_path, capsys):
    source, _ = tiles
    (source / "test_01.webp").unlink()
    target = tmp_path / "new"
    assert convert_tiles.main([str(source), str(target)]) == 2
    assert "is a tile missing?" in capsys.readouterr().err
    assert convert_tiles.main([str(tmp_path), str(target)]) == 2
    assert not target.exists()
    assert convert_tiles.main([]) == 2
