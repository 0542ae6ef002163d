"""Writing exports: complete folders or none, files as small as the bits promise, and documents that say everything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.models import load_model
from secateur.search.export.files import ONNX, POLICY, PT2, README, WEIGHTS, check_files, read_export
from secateur.search.export.load import load_compressed
from secateur.search.export.write import check_free, is_export_of, packed_tensors
from secateur.search.schema import SCHEMA

FACTORY = "secateur.envs.tasks.synthetic:synthetic_net"


def test_the_weights_file_is_as_small_as_the_bits_promise(tmp_path, untrained):
    graph = untrained.assembler.graph
    widths = tuple(group.units for group in graph.groups)
    sizes = {}
    for bits in (32, 8, 4):
        policy = CompressionPolicy(widths, (bits,) * len(graph.geometry.layers), (32,) * len(graph.geometry.layers))
        save_file(packed_tensors(untrained.finalist_assembler.assemble(policy)), tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits)).stat().st_size
    weights = sum(np.prod(untrained.assembler.model.get_submodule(layer.name).weight.shape) for layer in graph.geometry.layers)
    assert sizes[8] - sizes[4] == pytest.approx(weights / 2, abs=200)  # the header may differ by a few bytes
    assert sizes[32] - sizes[8] > 2.5 * weights


def test_policy_json_says_what_was_kept_and_scored(exported, untrained, policy):
    document = read_export(exported)
    assert document["schema"] == SCHEMA and document["metric"]["name"] == "top1"
    assert document["model"] == {
        "factory": "secateur:synthetic",
        "args": {},
        "input": [3, 8, 8],
        "inputs": [{"shape": [3, 8, 8], "dtype": "float32"}],
        "part": [],
    }
    assert [group["kept"] for group in document["groups"]] == [k.tolist() for k in untrained.assembler.kept(policy)]
    assert all(group["prune_ratio"] == 0.5 for group in document["groups"])
    assert document["budget"] == {"name": "phone", "limits": {"macs": 1e5}, "metric_drop": 0.02, "shares": {"macs": 0.4}}
    assert document["scores"]["validation"] == {"score": 0.8, "images": 256}
    assert document["scores"]["test"] == {"score": 0.7, "images": 768}
    assert document["costs"] == {"macs": 9e4, "weight_bytes": 3e3}
    assert document["policy"] == json.loads(json.dumps(asdict(policy)))
    assert document["data_config"]["name"] == "synthetic" and document["device"] is None
    assert "simulated" in document["note"]


def test_policy_json_says_how_each_layer_is_executed(exported):
    executed = [(layer["name"], layer["executed"]) for layer in read_export(exported)["execution"]]
    assert executed == [
        ("conv1", "int8"), ("conv2", "float32"), ("conv3", "int8"), ("conv4", "float32"), ("linear", "float32"),
    ]  # fmt: skip
    readme = (exported / README).read_text()
    assert "2 of 5 layers in 8-bit integers" in readme and "`conv2`, `linear`: Only its weight has bits" in readme


def test_the_code_in_the_readme_runs_and_all_give_the_same_answers(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    blocks = [part.split("```")[0] for part in (exported / README).read_text().split("```python\n")[1:]]
    pixels = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = []
    for block, given in zip(blocks, (pixels, pixels.numpy(), pixels), strict=True):
        exec(block, scope := {"pixels": given})
        logits.append(torch.as_tensor(scope["logits"]).detach())
    simulated, integer, stored = logits
    assert simulated.shape == (50, synthetic.NUM_CLASSES)
    assert torch.allclose(simulated, stored, atol=1e-5)  # fused or not, the sums differ in the last bits
    assert (simulated - integer).abs().mean() < 0.1 * simulated.std()


def test_the_files_are_named_with_their_checksums_and_name_no_place_of_this_machine(exported):
    document = read_export(exported)
    assert set(document["files"]) == {WEIGHTS, ONNX, PT2}
    check_files(exported, document)
    for path in exported.iterdir():
        content = path.read_bytes() if path.name != PT2 else b"".join(_members(path))
        assert str(Path.cwd()).encode() not in content and b"site-packages" not in content, path.name


def _members(path):
    with ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist()]


def test_an_export_goes_into_an_empty_folder_without_pt2(tmp_path, write, without_onnx):
    (tmp_path / "phone").mkdir()
    write(tmp_path / "phone")
    assert sorted(path.name for path in (tmp_path / "phone").iterdir()) == [README, ONNX, WEIGHTS, POLICY]
    assert "torch.export.load" not in (tmp_path / "phone" / README).read_text()


def test_an_export_of_a_policy_is_recognized(folder, policy):
    point = {"policy": asdict(policy)}
    assert is_export_of(folder, point, "phone") and is_export_of(folder, point, "phone", pt2=True)
    assert not is_export_of(folder, point, "watch")
    assert not is_export_of(folder.parent, point, "phone")
    assert not is_export_of(folder, {"policy": asdict(replace(policy, widths=(1, 1, 1)))}, "phone")
    (folder / PT2).unlink()
    assert not is_export_of(folder, point, "phone")


def test_an_existing_folder_is_left_alone(exported, tmp_path, write):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        write(exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="exists already"):
        write(file)


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


def test_a_failure_leaves_nothing_behind(tmp_path, write, without_onnx, monkeypatch):
    monkeypatch.setattr("secateur.search.export.write.load_compressed", lambda folder, factory: load_model(FACTORY))
    with pytest.raises(RuntimeError, match="computes something else"):
        write(tmp_path / "phone")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_names_the_module_that_must_be_trusted(tmp_path, untrained, write, without_onnx, monkeypatch):
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "plain_factory.py").write_text(
        "def net():\n    from secateur.envs.tasks.synthetic import synthetic_net\n\n    return synthetic_net()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(installed)
    model = untrained.config.model.model_copy(update={"factory": "plain_factory:net"})
    monkeypatch.setattr(untrained, "config", untrained.config.model_copy(update={"model": model}))
    write(tmp_path / "phone")
    with pytest.raises(InputError, match="importing `plain_factory` would run its code"):
        load_compressed("phone")
    code = (tmp_path / "phone" / README).read_text().split("```python\n")[1].split("```")[0]
    exec(code, scope := {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)})
    assert scope["logits"].shape == (2, synthetic.NUM_CLASSES)
