"""Whole searches for segmentation, super-resolution and detection, with tiny networks: from the configuration to model.onnx."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

import secateur
from secateur.envs.tasks.scenes import CLASSES, digit_scans, draw_scenes
from secateur.envs.tasks.splits import Dataset, array_pool, split_dataset
from secateur.envs.tasks.training import Recipe, cached_weights

SPLITS = {"train": 40, "calibration": 16, "validation": 16, "test": 16}


def _scenes(seed):
    pixels, digits = digit_scans()
    scenes = draw_scenes(pixels / 16, digits, np.arange(100), 40, seed, 0.0)
    return scenes.images[:, :, 16:48, 16:48], scenes.masks[:, 16:48, 16:48]


def segments(root, **splits):
    """Middles of scenes with the class of every pixel."""
    pools = [array_pool(images, masks) for images, masks in map(_scenes, (0, 1))]
    return split_dataset("middles", Dataset(*pools, CLASSES, (0.0,), (1.0,)), **splits)


def details(root, **splits):
    """Middles of scenes, and every second pixel of them as inputs."""
    pools = [array_pool(np.ascontiguousarray(images[:, :, ::2, ::2]), images) for images, _ in map(_scenes, (0, 1))]
    return split_dataset("middles", Dataset(*pools, (), (0.0,), (1.0,)), **splits)


def build(kind):
    """The network, with fixed random weights."""
    from secateur.envs.tasks.edsr import edsr
    from secateur.envs.tasks.unet import unet

    torch.manual_seed(0)
    return unet((4, 6, 8)) if kind == "segmentation" else edsr(blocks=1, width=6)


TASKS = {
    "segmentation": ("segmentation", "segments", [1, 32, 32], (11, 32, 32), "miou"),
    "restoration": ({"name": "restoration", "options": {"border": 2}}, "details", [1, 16, 16], (1, 32, 32), "psnr"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_a_search_ends_with_a_verified_winner(kind, tmp_path):
    task, data, shape, output, metric = TASKS[kind]
    run = secateur.search(
        {
            "model": {"factory": f"{__name__}:build", "args": {"kind": kind}, "input": shape},
            "data": {"name": f"{__name__}:{data}", **SPLITS},
            "task": task,
            "search": {"agent": "random", "evaluations": 4, "workers": 0},
            "space": {"prune_ratio": [0.0, 0.7], "weight_bits": [8]},
            "calibration": {"max_images": 16},
            "budgets": {"small": {"macs": "<= 60%"}},
            "finalize": {"top": 1},
            "output": {"root": str(tmp_path)},
        }
    )
    front = json.loads((run.folder / "front.json").read_text())
    assert front["metric"]["name"] == metric
    assert run.best("small").costs["macs"] <= 0.6 * front["dense"]["costs"]["macs"]
    export = run.folder / "exports" / "small"
    session = onnxruntime.InferenceSession(export / "model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: np.zeros((2, *shape), np.float32)})
    assert outputs.shape == (2, *output)
    verified = json.loads((export / "verify.json").read_text())
    (winner,) = front["final"]["points"]
    assert verified["failures"] == [] and verified["metric"]["name"] == metric
    assert verified["outputs"]["runtime_score"] == pytest.approx(winner["score"], abs=1e-3)


def boxes(root, **splits):
    """Scenes with the boxes of their digits, all in one class."""
    pixels, digits = digit_scans()
    pools = []
    for seed, count in ((0, 160), (1, 40)):
        scenes = draw_scenes(pixels / 16, digits, np.arange(100), count, seed, 0.0)
        targets = scenes.boxes.copy()
        targets[..., 4] = np.minimum(targets[..., 4], 0)
        pools.append(array_pool(scenes.images, targets))
    return split_dataset("scenes", Dataset(*pools, ("digit",), (0.0,), (1.0,)), **splits)


def train_weights(model, task, progress=None):
    """A detector that finds some digits."""
    return cached_weights(
        "detector", model, task, Recipe(epochs=12, batch_size=8, learning_rate=0.005, shift=0, optimizer="adamw")
    )


def build_detector():
    """An untrained detector of one class."""
    from secateur.envs.tasks.scene_detector import scene_detector

    return scene_detector((8, 16, 16), 16, classes=1)


@pytest.mark.slow
def test_the_network_inside_a_detector_is_pruned_and_quantized_and_verified_with_its_boxes(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics.detection", reason="mAP needs the extra `metrics`")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    run = secateur.search(
        {
            "model": {"factory": f"{__name__}:build_detector", "weights": "trained", "part": "network", "input": [1, 64, 64]},
            "data": {"name": f"{__name__}:boxes", **SPLITS, "train": 160, "validation": 20, "test": 20},
            "task": "detection",
            "search": {"agent": "greedy", "evaluations": 3, "workers": 0},
            "space": {"prune_ratio": [0.0, 0.7], "weight_bits": [8], "activation_bits": [8]},
            "calibration": {"max_images": 16},
            "budgets": {"small": {"macs": "<= 80%"}},
            "finalize": {"top": 1},
            "output": {"root": str(tmp_path)},
        }
    )
    front = json.loads((run.folder / "front.json").read_text())
    assert front["metric"]["name"] == "map" and front["dense"]["score"] > 0.2
    verified = json.loads((run.folder / "exports" / "small" / "verify.json").read_text())
    (winner,) = front["final"]["points"]
    assert verified["failures"] == [] and winner["score"] > 0.1
    assert verified["outputs"]["runtime_score"] == pytest.approx(winner["score"], abs=0.02)
    detector = run.best("small").model()
    with torch.no_grad():
        assert [set(found) for found in detector(list(torch.rand(2, 1, 64, 64)))] == [{"boxes", "scores", "labels"}] * 2
    assert sum(p.numel() for p in detector.parameters()) < sum(p.numel() for p in build_detector().parameters())
