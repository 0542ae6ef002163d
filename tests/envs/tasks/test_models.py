"""Weights load from what people have, and what cannot be used is said in one sentence."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.envs.core import InputError
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.core import check_finite
from secateur.envs.tasks.data import DATASETS
from secateur.envs.tasks.imports import FORMER_NAMES, current_name
from secateur.envs.tasks.models import FACTORIES, find_factory, load_model

FACTORY = "secateur:resnet20"


def make_reference():
    torch.manual_seed(1)
    return load_model(FACTORY)


def assert_same(model, reference):
    state = model.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("form", ["plain", "nested", "parallel", "compiled", "safetensors"])
def test_usual_forms_of_a_weights_file_load(form, tmp_path):
    reference = make_reference()
    state = reference.state_dict()
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        prefix = {"parallel": "module.", "compiled": "module._orig_mod."}.get(form, "")
        renamed = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({"state_dict": renamed, "epoch": 7} if form == "nested" else renamed, path)
    torch.manual_seed(2)
    model = load_model(FACTORY, path)
    assert_same(model, reference)
    assert not model.training


def test_half_precision_becomes_float32_and_batch_counters_may_be_missing(tmp_path):
    reference = make_reference()
    state = {name: tensor.half() for name, tensor in reference.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "half.pth")
    model = load_model(FACTORY, tmp_path / "half.pth")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())


@pytest.mark.parametrize("name", FACTORIES)
def test_built_in_networks_have_short_names(name):
    function = find_factory(f"secateur:{name}")[0]
    assert f"{function.__module__}:{function.__name__}" == FACTORIES[name]


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_names_of_version_0_1_have_present_names(former):
    name = current_name(former)
    assert current_name(f"secateur.{former}") == current_name(name) == name
    assert name in DATASETS or find_factory(former) == find_factory(name)
    assert current_name("envs.tasks.mine:resnet56") == "envs.tasks.mine:resnet56"


def test_torchvision_models_are_found_by_name():
    assert load_model("torchvision:squeezenet1_0", factory_args={"num_classes": 7}).classifier[1].out_channels == 7


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_that_executes_code_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "extra": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    for name in ("bomb.pth", "bare.pth"):
        with pytest.raises(InputError, match="wants to execute code"):
            load_model(FACTORY, tmp_path / name)
    assert not (tmp_path / "executed").exists()


def save_state(path, change):
    state = make_reference().state_dict()
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.pop("layer1.0.conv1.weight"),
            "1 tensors are missing, first `layer1.0.conv1.weight` (16, 16",
        ),
        (lambda state: state.update(fc=torch.zeros(3)), "1 are unknown, first `fc` (3,)"),
        (lambda state: state.update({"linear.bias": torch.zeros(3)}), "`linear.bias`: file (3,), model (10,)"),
        (lambda state: state["conv1.weight"].fill_(float("nan")), "`conv1.weight` holds NaN"),
        (lambda state: state.update(epoch=3), "must hold a state dict"),
        (lambda state: state.update({0: torch.zeros(3)}), "must hold a state dict (tensors by name)"),
    ],
)
def test_other_tensors_are_named(change, words, tmp_path):
    save_state(tmp_path / "other.pth", change)
    with pytest.raises(InputError) as error:
        load_model(FACTORY, tmp_path / "other.pth")
    assert words in str(error.value)


def test_other_architecture_is_named(tmp_path):
    torch.save(make_reference().state_dict(), tmp_path / "resnet20.pth")
    with pytest.raises(InputError, match="another architecture"):
        load_model("secateur:resnet32", tmp_path / "resnet20.pth")


@pytest.mark.parametrize("content", [b"", b"garbage that is no archive", b"PK\x03\x04 half an archive", b"\x80\x02"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_files_are_input_errors(content, suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"weights.{suffix}.* (damaged|not a readable)"):
        load_model(FACTORY, path)


def test_truncated_file_is_an_input_error(tmp_path):
    torch.save(make_reference().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200_000])
    with pytest.raises(InputError, match="damaged"):
        load_model(FACTORY, tmp_path / "half.pth")


def fail():
    raise RuntimeError("no such depth")


def make_number():
    return 3


def leave():
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("factory", "arguments", "words"),
    [
        ("secateur:resnet57", {}, "secateur has no model `resnet57`. Did you mean `resnet56`? Known: resnet20, "),
        ("secateur.envs.tasks.cifar_resnet:resnet57", {}, "Did you mean `resnet56`"),
        ("secateur.envs.tasks.cifar_resnets:resnet56", {}, "no module `secateur.envs.tasks.cifar_resnets`"),
        ("torchvision:resnet19", {}, "Did you mean `resnet1"),
        ("resnet56", {}, '"package.module:name"'),
        (FACTORY, {"classes": 10}, "classes"),
        ("test_models:fail", {}, "no such depth"),
        ("test_models:leave", {}, "failed with arguments {}: SystemExit"),
        ("test_models:make_number", {}, "must return a torch.nn.Module"),
        ("test_models:FACTORY", {}, "must be a function, but is str"),
    ],
)
def test_factory_errors_are_one_sentence(factory, arguments, words, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    with pytest.raises(InputError) as error:
        load_model(factory, factory_args=arguments)
    assert words in str(error.value) and "model.factory" in str(error.value)


def test_missing_weights_file_is_named():
    with pytest.raises(InputError, match="nowhere.pth` is not a file"):
        load_model(FACTORY, "nowhere.pth")


def test_trained_weights_come_from_the_factorys_module(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    epochs = []
    data = synthetic.load()
    model = load_model("secateur:synthetic", "trained", {"width": 4}, Classification(data), epochs.append)
    images, labels = data.tensors(data.test)
    assert (model(images).argmax(1) == labels).float().mean() > 0.6
    assert [step.epoch for step in epochs] == list(range(1, synthetic.RECIPE.epochs + 1))
    with pytest.raises(InputError, match="train=.rest"):
        load_model("secateur:synthetic", "trained", task=Classification(synthetic.load(train=0)))
    with pytest.raises(InputError, match="train_weights"):
        load_model(FACTORY, "trained", task=Classification(data))
    with pytest.raises(InputError, match="train_weights"):
        load_model("torchvision:alexnet", "trained", task=Classification(data))


def broken_network(name, value):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network.register_buffer("mask", torch.full((2,), float("-inf")))  # infinite masks are common
    if name:
        network.state_dict()[name].flatten()[1] = value
    return network


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factory_with_broken_weights_is_refused(name, value, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    with pytest.raises(InputError, match=f"`{name}` holds NaN or infinite"):
        load_model("test_models:broken_network", factory_args={"name": name, "value": value})


def test_infinite_masks_are_allowed(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    model = load_model("test_models:broken_network", factory_args={"name": None, "value": 0.0})
    assert model.mask.isinf().all()


class Logarithm(nn.Module):
    def forward(self, x):
        return x.flatten(1).log()


def test_outputs_that_are_not_finite_are_counted():
    images = torch.rand(80, 3, 2, 2) + 0.1
    check_finite(Logarithm(), [images])
    images[[3, 70], 0, 0, 0] = torch.tensor([0.0, -1.0])  # minus infinity and NaN
    with pytest.raises(InputError, match="outputs for 2 of 80 samples before any compression"):
        check_finite(Logarithm(), [images])


def test_model_is_a_module_in_eval_mode():
    assert isinstance(load_model(FACTORY), nn.Module)
