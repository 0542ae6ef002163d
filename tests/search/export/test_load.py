"""Loading exports: the model is the one that was written, and damaged or changed folders are refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import secateur
from secateur.envs.core import InputError
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight
from secateur.envs.tasks.models import load_model
from secateur.search.export.files import ONNX, POLICY, PT2, WEIGHTS, check_files, read_export
from secateur.search.export.load import load_compressed

FACTORY = "secateur.envs.tasks.synthetic:synthetic_net"


def test_the_public_function_loads_exports():
    assert secateur.load_compressed is load_compressed


def test_the_model_read_back_is_the_same_bit_for_bit(exported, untrained, policy):
    network, loaded = untrained.finalist_assembler.assemble(policy), load_compressed(exported)
    expected = network.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    images, _ = untrained.task.data.tensors(untrained.task.data.test)
    with torch.inference_mode():
        assert torch.equal(loaded(images[:64]), network(images[:64]))
    assert not loaded.training


def test_bits_and_grids_come_back(exported, untrained, policy):
    loaded = dict(load_compressed(exported).named_modules())
    for layer, weight_bits, activation_bits in zip(
        untrained.assembler.graph.geometry.layers, policy.weight_bits, policy.activation_bits, strict=True
    ):
        weight, grid = quantized_weight(loaded[layer.name]), activation_grid(loaded[layer.name])
        assert (32 if weight is None else weight.bits) == weight_bits
        assert (32 if grid is None else grid.bits) == activation_bits


@pytest.mark.parametrize("name", [WEIGHTS, ONNX, PT2])
def test_changed_files_are_found(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name} is not the file that was exported"):
        check_files(folder, read_export(folder))


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


def test_a_hand_edited_policy_is_found(folder):
    edit(folder, lambda d: d["costs"].update(macs=1.0))
    with pytest.raises(InputError, match="policy.json is not the file that was exported"):
        check_files(folder, read_export(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("layers"),
        lambda d: d.update(schema=3),
        lambda d: d.pop("schema"),
        lambda d: d["layers"][0].update(weight_bits=4),
        lambda d: d["layers"][0].update(weight_shape=[1, 1]),
        lambda d: d["layers"][0].update(name="conv9"),
        lambda d: d["layers"][0].update(activation_grid=None),
        lambda d: d["layers"].pop(0),
        lambda d: d["model"].update(factory="secateur.envs.tasks.synthetic:no_such_net"),
        lambda d: d["model"].update(factory="secateur.envs.tasks.cifar_resnet:resnet20"),
        lambda d: d["model"].update(inputs=[{"shape": [5, 8, 8], "dtype": "float32"}]),
        lambda d: d["model"].update(args=[1]),
    ],
)
def test_a_hand_edited_policy_is_refused(folder, change):
    edit(folder, change)
    with pytest.raises(InputError):
        load_compressed(folder)


def test_a_function_that_is_not_trusted_is_never_called(folder):
    mark = folder.parent / "executed"
    edit(folder, lambda d: d["model"].update(factory="os:system", args={"command": f"touch {mark}"}))
    with pytest.raises(InputError, match=r"policy.json names `os:system` \(`model.factory`\), but importing.*trust=\[\"os\"\]"):
        load_compressed(folder)
    assert not mark.exists()
    assert isinstance(load_compressed(folder, lambda command: load_model(FACTORY)), torch.nn.Module)


def test_a_function_of_a_module_without_classes_loads(folder, tmp_path, monkeypatch):
    module = "from secateur.envs.tasks import synthetic\ndef make(): return synthetic.synthetic_net()\n"
    (tmp_path / "module_without_classes.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, lambda d: d["model"].update(factory="module_without_classes:make"))
    with pytest.raises(InputError, match="module_without_classes"):
        load_compressed(folder)
    assert "module_without_classes" not in sys.modules
    assert isinstance(load_compressed(folder, trust=["module_without_classes"]), torch.nn.Module)


def test_a_name_that_the_user_gives_is_called(folder):
    edit(folder, lambda d: d["model"].update(factory="os:system"))
    assert isinstance(load_compressed(folder, FACTORY), torch.nn.Module)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_a_damaged_policy_is_named(folder, text):
    (folder / POLICY).write_text(text)
    with pytest.raises(InputError, match="policy.json is damaged"):
        load_compressed(folder)


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(InputError, match="is not an export"):
        load_compressed(tmp_path)
