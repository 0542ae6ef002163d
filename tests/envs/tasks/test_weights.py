"""The state dict is found in the checkpoints that training scripts write, and one line says what was taken."""

import argparse
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from secateur.envs.core import InputError
from secateur.envs.tasks.weights import load_weights


def make_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))


STATE = make_network(1).state_dict()
OTHER = make_network(2).state_dict()
COUNTERS = {name: torch.zeros(1) for name in ("total_ops", "total_params", "0.total_ops", "0.total_params")}


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def load(content, path):
    """Return the status lines of loading this content, after a check of the tensors."""
    torch.save(content, path)
    network, lines = make_network(3), []
    load_weights(network, path, lines.append)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name
    return lines


@pytest.mark.parametrize("name", ["mine.safetensors", "0a1b2c"])
def test_safetensors_files_have_any_name(name, tmp_path):
    save_file(STATE, tmp_path / name)
    network = make_network(3)
    load_weights(network, tmp_path / name)
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema", "mine"])
def test_the_state_dict_is_found_under_a_key(key, tmp_path):
    lines = load({key: STATE, "epoch": 7, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "c.pth")
    assert lines == [f"weights from c.pth: the tensors under `{key}` are used"]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.", "model._orig_mod.", "backbone.net."]
)
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path):
    lines = load(prefixed(prefix), tmp_path / "c.pth")
    assert lines == [f"weights from c.pth: the prefix `{prefix}` of the names is removed"]


def test_a_plain_state_dict_needs_no_line(tmp_path):
    assert load(STATE, tmp_path / "c.pth") == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_entries_of_tools_are_ignored(wrapped, tmp_path):
    if wrapped:
        lines = load({"ema": {"shadow": AveragedModel(make_network(1)).state_dict()}}, tmp_path / "c.pth")
        assert "`ema.shadow`" in lines[0] and "prefix `module.`" in lines[0] and "first `n_averaged`" in lines[0]
    else:
        assert "4 other entries are ignored, first `total_ops`" in load({**STATE, **COUNTERS}, tmp_path / "c.pth")[0]


def test_of_several_networks_the_line_says_which_one_is_used(tmp_path):
    lines = load({"ema": OTHER, "model": STATE, "args": argparse.Namespace(epochs=3)}, tmp_path / "c.pth")
    assert lines == ["weights from c.pth: the tensors under `model` are used; those under `ema` are not"]


def test_other_parts_of_a_training_module_are_ignored(tmp_path):
    lines = load({"state_dict": {**prefixed("model."), "loss.weight": torch.ones(3)}}, tmp_path / "c.pth")
    assert "1 other entries are ignored, first `loss.weight`" in lines[0]


def test_two_equal_networks_in_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="several networks .* `student.`, `teacher.`"):
        load({**prefixed("student."), **prefixed("teacher.", OTHER)}, tmp_path / "c.pth")


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what people's files hold
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("sparse", torch.Tensor.to_sparse),
        ("sparse", torch.Tensor.to_sparse_csr),
        ("meta", lambda tensor: tensor.to("meta")),
        ("quantized", quantized),
        ("complex", lambda tensor: tensor.to(torch.complex64)),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_tensors_that_are_no_dense_real_numbers_are_named(kind, convert, tmp_path):
    with pytest.raises(InputError, match=f"`3.weight` is a {kind} tensor"):
        load({**STATE, "3.weight": convert(STATE["3.weight"])}, tmp_path / "c.pth")


def test_a_deep_file_is_refused(tmp_path):
    content = STATE
    for _ in range(50):
        content = {"model": content}
    with pytest.raises(InputError, match="must hold a state dict"):
        load(content, tmp_path / "c.pth")
