"""Exports: the model that is read back is the one that was searched, and damaged folders are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.models import load_model
from secateur.search.config import DataSection
from secateur.search.export.folder import (
    ONNX,
    POLICY,
    PT2,
    README,
    WEIGHTS,
    check_files,
    check_free,
    is_export_of,
    load_compressed,
    read_export,
    write_export,
)

FACTORY = "secateur:synthetic"
BUDGET = Budget("phone", {"macs": 1e5}, top1_drop=0.02)
COSTS = {"macs": 9e4, "weight_bytes": 3e3}
VALIDATION, TEST = Evaluation(0.8, COSTS, images=256), Evaluation(0.7, COSTS, "final", images=768)


def plugin(registry, name):
    config, made = registry[name]
    return made(config())


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    data = synthetic.load()
    model = load_model(FACTORY)
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    images, labels = data.tensors(data.calibration)
    calibration = calibrate(model, graph, images, CalibrationConfig())
    dense_model = DenseModel(model, graph, calibration, images, labels, np.random.default_rng(0))
    scores = plugin(IMPORTANCES, "l1_norm").scores(dense_model)
    recoveries = [plugin(RECOVERIES, name) for name in ("least_squares", "batch_norm")]
    assembler = Assembler(model, graph, scores, plugin(QUANTIZERS, "uniform"), recoveries[1:], calibration, images)
    finalist_assembler = replace(assembler, recoveries=recoveries)
    config = SimpleNamespace(
        model=SimpleNamespace(factory=FACTORY, args={}, input=(3, 8, 8)),
        data=DataSection(name="synthetic", calibration=64, validation=256, train="rest"),
    )
    dense = Evaluation(0.9, {"macs": 3e5, "weight_bytes": 1e4}, images=256)
    return SimpleNamespace(
        config=config, data=data, assembler=assembler, finalist_assembler=finalist_assembler, dense=dense, device=None
    )


@pytest.fixture(scope="module")
def policy(problem):
    """Half of every group; all kinds of bits next to each other."""
    layers = len(problem.assembler.graph.geometry.layers)
    widths = tuple(group.units // 2 for group in problem.assembler.graph.groups)
    return CompressionPolicy(widths, (8, 4, 3, 32, 2)[:layers], (8, 32, 8, 8, 32)[:layers])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, problem, policy):
    folder = tmp_path_factory.mktemp("exports") / "phone"
    write_export(folder, problem, policy, BUDGET, VALIDATION, TEST, pt2=True)
    return folder


@pytest.fixture
def folder(tmp_path, exported):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "phone")


def test_the_model_read_back_is_the_same_bit_for_bit(folder, problem, policy):
    network, loaded = problem.finalist_assembler.assemble(policy), load_compressed(folder)
    expected = network.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    images, _ = problem.data.tensors(problem.data.test)
    with torch.inference_mode():
        assert torch.equal(loaded(images[:64]), network(images[:64]))
    assert not loaded.training


def test_bits_and_grids_come_back(folder, problem, policy):
    loaded = dict(load_compressed(folder).named_modules())
    for layer, weight_bits, activation_bits in zip(
        problem.assembler.graph.geometry.layers, policy.weight_bits, policy.activation_bits, strict=True
    ):
        weight, grid = quantized_weight(loaded[layer.name]), activation_grid(loaded[layer.name])
        assert (32 if weight is None else weight.bits) == weight_bits
        assert (32 if grid is None else grid.bits) == activation_bits


def test_the_files_are_as_small_as_the_bits_promise(tmp_path, problem):
    graph = problem.assembler.graph
    widths = tuple(group.units for group in graph.groups)
    sizes = {}
    for bits in (32, 8, 4):
        policy = CompressionPolicy(widths, (bits,) * len(graph.geometry.layers), (32,) * len(graph.geometry.layers))
        write_export(tmp_path / str(bits), problem, policy, BUDGET, VALIDATION)
        sizes[bits] = (tmp_path / str(bits) / WEIGHTS).stat().st_size
    weights = sum(np.prod(problem.assembler.model.get_submodule(layer.name).weight.shape) for layer in graph.geometry.layers)
    assert sizes[8] - sizes[4] == pytest.approx(weights / 2, abs=200)  # the header may differ by a few bytes
    assert sizes[32] - sizes[8] > 2.5 * weights


def test_policy_json_says_what_was_kept_and_scored(folder, problem, policy):
    document = read_export(folder)
    assert document["schema"] == 1 and document["model"] == {"factory": FACTORY, "args": {}, "input": [3, 8, 8]}
    assert [group["kept"] for group in document["groups"]] == [k.tolist() for k in problem.assembler.kept(policy)]
    assert all(group["prune_ratio"] == 0.5 for group in document["groups"])
    assert document["budget"] == {"name": "phone", "limits": {"macs": 1e5}, "top1_drop": 0.02}
    assert document["scores"]["validation"] == {"top1": 0.8, "images": 256}
    assert document["scores"]["test"] == {"top1": 0.7, "images": 768}
    assert document["costs"] == COSTS
    assert document["policy"] == json.loads(json.dumps(asdict(policy)))
    assert document["data_config"]["name"] == "synthetic" and document["device"] is None
    assert "simulated" in document["note"]


def test_policy_json_says_how_each_layer_is_executed(folder):
    executed = [(layer["name"], layer["executed"]) for layer in read_export(folder)["execution"]]
    assert executed == [
        ("conv1", "int8"), ("conv2", "float32"), ("conv3", "int8"), ("conv4", "float32"), ("linear", "float32"),
    ]  # fmt: skip
    readme = (folder / README).read_text()
    assert "2 of 5 layers in 8-bit integers" in readme and "`conv2`, `linear`: Only its weight has bits" in readme


def test_the_code_in_the_readme_runs_and_all_say_the_same(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    blocks = [part.split("```")[0] for part in (folder / README).read_text().split("```python\n")[1:]]
    pixels = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = []
    for block, given in zip(blocks, (pixels, pixels.numpy(), pixels), strict=True):
        exec(block, scope := {"pixels": given})
        logits.append(torch.as_tensor(scope["logits"]).detach())
    simulated, integer, stored = logits
    assert simulated.shape == (50, synthetic.NUM_CLASSES)
    assert torch.allclose(simulated, stored, atol=1e-5)  # fused or not, the sums differ in the last bits
    assert (simulated.argmax(1) == integer.argmax(1)).float().mean() > 0.9


def test_the_files_are_named_with_their_checksums_and_name_no_place_of_this_machine(folder):
    document = read_export(folder)
    assert set(document["files"]) == {WEIGHTS, ONNX, PT2}
    check_files(folder, document)
    for path in folder.iterdir():
        content = path.read_bytes() if path.name != PT2 else b"".join(_members(path))
        assert str(Path.cwd()).encode() not in content and b"site-packages" not in content, path.name


def _members(path):
    with ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist()]


def test_pt2_is_written_only_if_asked_for(tmp_path, problem, policy):
    write_export(tmp_path / "phone", problem, policy, BUDGET, VALIDATION)
    assert sorted(path.name for path in (tmp_path / "phone").iterdir()) == [README, ONNX, WEIGHTS, POLICY]
    assert "torch.export.load" not in (tmp_path / "phone" / README).read_text()


def test_an_export_of_a_policy_is_known_again(folder, policy):
    point = {"policy": asdict(policy)}
    assert is_export_of(folder, point, "phone") and is_export_of(folder, point, "phone", pt2=True)
    assert not is_export_of(folder, point, "watch")
    assert not is_export_of(folder.parent, point, "phone")
    assert not is_export_of(folder, {"policy": asdict(replace(policy, widths=(1, 1, 1)))}, "phone")
    (folder / PT2).unlink()
    assert not is_export_of(folder, point, "phone")


@pytest.mark.parametrize("name", [WEIGHTS, ONNX, PT2])
def test_changed_files_are_found(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name} is not the file that was exported"):
        check_files(folder, read_export(folder))


def test_a_hand_edited_policy_is_found(folder):
    edit(folder, lambda d: d["costs"].update(macs=1.0))
    with pytest.raises(InputError, match="policy.json is not the file that was exported"):
        check_files(folder, read_export(folder))


def test_an_existing_folder_is_left_alone(folder, problem, policy):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write_export(folder, problem, policy, BUDGET, VALIDATION)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    file = folder.parent / "file"
    file.write_text("")
    with pytest.raises(InputError, match="exists already"):
        write_export(file, problem, policy, BUDGET, VALIDATION)
    (folder.parent / "empty").mkdir()
    write_export(folder.parent / "empty", problem, policy, BUDGET, VALIDATION)


def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written: .*`output`"):
            check_free(place)
    check_free(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refuse(path, mode=0o777):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.mkdir", refuse)  # root may write everywhere, so file modes are no test
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        check_free(tmp_path / "new")


def test_a_failure_leaves_nothing_behind(tmp_path, problem, policy, monkeypatch):
    monkeypatch.setattr("secateur.search.export.folder.load_compressed", lambda folder, factory: load_model(FACTORY))
    with pytest.raises(RuntimeError, match="computes something else"):
        write_export(tmp_path / "phone", problem, policy, BUDGET, VALIDATION)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_or_changed_weights_file_is_refused(folder):
    weights = folder / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(InputError, match="truncated or was changed"):
        load_compressed(folder)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="truncated or was changed"):
        load_compressed(folder)
    weights.unlink()
    with pytest.raises(InputError, match="has no model.safetensors"):
        load_compressed(folder)


def edit(folder, change):
    document = json.loads((folder / POLICY).read_text())
    change(document)
    (folder / POLICY).write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("layers"),
        lambda d: d.update(schema=2),
        lambda d: d.pop("schema"),
        lambda d: d["layers"][0].update(weight_bits=4),
        lambda d: d["layers"][0].update(weight_shape=[1, 1]),
        lambda d: d["layers"][0].update(name="conv9"),
        lambda d: d["layers"][0].update(activation_grid=None),
        lambda d: d["layers"].pop(0),
        lambda d: d["model"].update(factory="secateur.envs.tasks.synthetic:no_such_net"),
        lambda d: d["model"].update(factory="secateur:resnet20"),
        lambda d: d["model"].update(input=[5, 8, 8]),
        lambda d: d["model"].update(args=[1]),
    ],
)
def test_a_hand_edited_policy_is_refused(folder, change):
    edit(folder, change)
    with pytest.raises(InputError):
        load_compressed(folder)


def test_a_function_that_makes_no_network_is_never_called(folder):
    mark = folder.parent / "executed"
    edit(folder, lambda d: d["model"].update(factory="os:system", args={"command": f"touch {mark}"}))
    with pytest.raises(InputError, match="`os:system`.* not called.*factory="):
        load_compressed(folder)
    assert not mark.exists()
    assert isinstance(load_compressed(folder, lambda command: load_model(FACTORY)), torch.nn.Module)


def test_a_factory_that_does_not_look_like_one_is_named_in_the_readme(tmp_path, problem, policy, monkeypatch):
    (tmp_path / "plain_factory.py").write_text(
        "def net():\n    from secateur.envs.tasks.synthetic import synthetic_net\n\n    return synthetic_net()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    model = SimpleNamespace(factory="plain_factory:net", args={}, input=(3, 8, 8))
    monkeypatch.setattr(problem.config, "model", model)
    write_export(tmp_path / "phone", problem, policy, BUDGET, VALIDATION)
    with pytest.raises(InputError, match="was not called"):
        load_compressed("phone")
    code = (tmp_path / "phone" / README).read_text().split("```python\n")[1].split("```")[0]
    exec(code, scope := {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)})
    assert scope["logits"].shape == (2, synthetic.NUM_CLASSES)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_damaged_policy_is_named(folder, text):
    (folder / POLICY).write_text(text)
    with pytest.raises(InputError, match="policy.json is damaged"):
        load_compressed(folder)


def test_what_is_no_export_is_named(tmp_path):
    with pytest.raises(InputError, match="is not an export"):
        load_compressed(tmp_path)
