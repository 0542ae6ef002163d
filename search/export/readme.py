"""The README.md of an export: how to load the model, its scores and costs, and how each layer is executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.envs.inputs import Signature, inputs_of
from secateur.envs.tasks.imports import OBJECT
from secateur.envs.tasks.trust import is_built_in, module_of
from secateur.search.export.files import ONNX, PT2, input_names
from secateur.search.export.image_size import size_sentence
from secateur.search.schema import metric_of


def export_readme(document: Mapping[str, Any], name: str) -> str:
    """Return the text of README.md.

    Args:
        document: the content of policy.json.
        name: of the folder.
    """
    metric = metric_of(document)
    scores = [(split, score) for split, score in document["scores"].items() if score is not None]
    lines = "\n".join(
        f"- {split} {metric.label}: {metric.text(score['score'])}{_samples(score['images'])}" for split, score in scores
    )
    costs = "\n".join(
        f"- {cost}: {_number(value)} ({100 * value / document['dense_costs'][cost]:.1f} % of dense)"
        for cost, value in document["costs"].items()
    )
    factory = document["model"]["factory"]
    argument, loading = _loading(factory)
    torch_call, numpy_call = _calls(document)
    return f"""# {factory}, compressed for the budget "{document["budget"]["name"]}"

In PyTorch:

```python
import torch
from secateur import load_compressed

model = load_compressed("{name}"{argument})  # this folder; a torch.nn.Module in eval mode
{torch_call}
```

In ONNX Runtime, {_executed(document)}:

```python
import numpy as np, onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")  # exact 8-bit sums on processors without VNNI
session = onnxruntime.InferenceSession("{name}/{ONNX}", options, providers=["CPUExecutionProvider"])
{numpy_call}
```
{_image_sizes(document)}{_pt2_readme(document, name, torch_call)}
{costs}
{lines}

{loading}

{document["note"]}{_execution_notes(document)}
"""


def _loading(factory: str) -> tuple[str, str]:
    """Return the further argument of `load_compressed`, and a sentence about what loading does."""
    if factory.startswith(OBJECT):
        model = factory.removeprefix(OBJECT)
        return ", dense", f"`dense` is the model that was compressed, a `{model}` object; its weights do not matter."
    if is_built_in(factory):
        return "", "Loading in PyTorch runs no code of this folder, and unpickles nothing."
    module = module_of(factory)
    calls = f"Loading in PyTorch imports `{module}` and calls `{factory}`: its code runs. Name only modules that you trust."
    return f', trust=["{module}"]', calls


def _calls(document: Mapping[str, Any]) -> tuple[str, str]:
    """Return the lines that run the model in PyTorch and in ONNX Runtime."""
    inputs, normalization = inputs_of(document["model"]), document["normalization"]
    output = "logits" if document.get("task", {}).get("name", "classification") == "classification" else "outputs"
    if normalization is None:
        names = ["x"] if len(inputs) == 1 else [f"x{index}" for index in range(len(inputs))]
        shapes = "; ".join(
            f"{name}: (N, {', '.join(map(str, entry['shape']))}) {entry['dtype']}"
            for name, entry in zip(names, inputs, strict=True)
        )
        feeds = ", ".join(f'"{given}": {name}' for given, name in zip(input_names(len(inputs)), names, strict=True))
        return (
            f"{output} = model({_arguments(document['model'], names)})  # {shapes}",
            f"{output} = session.run(None, {{{feeds}}})  # the same arrays",
        )
    mean, std = ([round(value, 6) for value in normalization[key]] for key in ("mean", "std"))
    pixels = f"# pixels: (N, {', '.join(map(str, inputs[0]['shape']))}) uint8"
    return (
        f"mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in ({mean}, {std}))\n"
        f"{output} = model((pixels.float() / 255 - mean) / std)  {pixels}",
        f"mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in ({mean}, {std}))\n"
        f'({output},) = session.run(None, {{"input": (pixels.astype(np.float32) / 255 - mean) / std}})  {pixels}',
    )


class _Name(str):
    """A variable, which code shows without quotes."""

    __repr__ = str.__str__


def _arguments(model: Mapping[str, Any], names: list[str]) -> str:
    """Return the arguments of the model's call, as code."""
    if not model.get("call"):
        return ", ".join(names)
    args, kwargs = Signature.read(model["call"]).arguments([_Name(name) for name in names])
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])


def _samples(count: int) -> str:
    return f" of {count} samples" if count else ""


def _number(value: float) -> str:
    """Return a count as a whole number, a smaller value with four significant digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _executed(document: Mapping[str, Any]) -> str:
    layers = document["execution"]
    integer = sum(layer["executed"] == "int8" for layer in layers)
    if not integer:
        return "all layers in float32"
    others = ", the others in float32" if integer < len(layers) else ""
    return f"{integer} of {len(layers)} layers in 8-bit integers{others}"


def _execution_notes(document: Mapping[str, Any]) -> str:
    """Return the notes on how model.onnx executes the layers: each sentence once, with its layers."""
    layers_of: dict[str, list[str]] = {}
    for layer in document["execution"]:
        if layer["note"]:
            layers_of.setdefault(layer["note"], []).append(layer["name"])
    lines = "".join(f"\n- {', '.join(f'`{name}`' for name in names)}: {note}" for note, names in layers_of.items())
    return f"\n\nHow `{ONNX}` executes these layers:\n{lines}" if lines else ""


def _image_sizes(document: Mapping[str, Any]) -> str:
    """Return which sizes of images model.onnx takes, if its outputs have positions."""
    sentence = size_sentence(document["onnx"]) if "onnx" in document else ""
    shape = " x ".join(map(str, document["model"]["input"][1:]))
    return f"\n{sentence} Costs and latency below are those of {shape}.\n" if sentence else ""


def _pt2_readme(document: Mapping[str, Any], name: str, torch_call: str) -> str:
    if PT2 not in document["files"]:
        return ""
    if document["model"].get("call"):  # a program takes the tensors of the arguments one after the other
        torch_call = f"outputs = model({', '.join(f'x{index}' for index in range(len(inputs_of(document['model']))))})"
    return f"""
With torch alone, quantization simulated:

```python
import torch

model = torch.export.load("{name}/{PT2}").module()
{torch_call}
```
"""
