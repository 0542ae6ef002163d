"""Makes models plain: wrappers are removed, and layers whose weight is computed get a plain weight.

Spectral norm, weight norm, masks (`torch.nn.utils.prune`) and weight standardization compute a layer's weight from other
tensors in every forward pass. In eval mode the result is constant. After `make_weights_plain` the layer stores this constant as
its weight, and no longer the tensors behind it: a parametrized layer gets its former class back, and an object of a subclass
such as `StdConv2d` becomes an object of `nn.Conv2d`. The outputs stay the same; fine-tuning changes the plain weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

_LAYERS: dict[type[nn.Module], tuple[Callable[..., Tensor], int | None]] = {
    nn.Linear: (F.linear, None),
    nn.Conv1d: (F.conv1d, 1),
    nn.Conv2d: (F.conv2d, 2),
    nn.Conv3d: (F.conv3d, 3),
    nn.ConvTranspose1d: (F.conv_transpose1d, 1),
    nn.ConvTranspose2d: (F.conv_transpose2d, 2),
    nn.ConvTranspose3d: (F.conv_transpose3d, 3),
}
"""{class of a plain layer: (its function, number of spatial axes; None: linear)}."""

_WRAPPED = ("module", "_orig_mod")
"""Attribute with the model inside `DataParallel`, `DistributedDataParallel` or `AveragedModel`, and inside `torch.compile`."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that only call it: `nn.DataParallel`, `torch.compile` and the like, also nested.

    A wrapper is a module of PyTorch whose only child is the model.
    """
    while type(model).__module__.startswith("torch.") and not isinstance(model, (nn.Sequential, nn.ModuleList)):
        inner = [child for name, child in model.named_children() if name in _WRAPPED]
        if len(inner) != 1 or len(list(model.children())) != 1:
            break
        model = inner[0]
    return model


@torch.no_grad()
def make_weights_plain(model: nn.Module) -> list[str]:
    """Give convolutions and linear layers with a computed weight a plain weight, in place; return their names.

    Layers whose weight depends on the input, and modules that are not subclasses of PyTorch's layers, are not changed.

    Args:
        model: in eval mode.
    """
    changed = []
    for name, module in model.named_modules():
        base = next((kind for kind in type(module).__mro__ if kind in _LAYERS), None)
        if base is None:
            continue
        removed = _remove_parametrizations(module) or _remove_hooks(module)
        if (type(module) is not base and _become_plain(module, base)) or removed:
            changed.append(name)
    return changed


def _remove_parametrizations(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module):
        return False
    parametrizations: Any = module.parametrizations
    for tensor in list(parametrizations):
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    return True


def _remove_hooks(module: nn.Module) -> bool:
    """Remove the hooks with which PyTorch's older functions compute a weight; return whether there were any."""
    hooks = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
    return len(module._forward_pre_hooks) < len(hooks)


class _Recorder(TorchFunctionMode):
    """Records the calls of one function: input, weight, bias, result."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Any, ...]] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch and record it."""
        result = function(*args, **(kwargs or {}))
        if function is self.function:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            self.calls.append((given["input"], given["weight"], given.get("bias"), result))
        return result


def _become_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Turn an object of a subclass into one of `base` if it is a plain layer with a computed weight; return whether it is."""
    inputs = _random_inputs(module, base)
    try:
        found = [_weight_and_bias(module, base, x) for x in inputs]
        expected = [module(x) for x in inputs]
    except Exception:  # the user's forward may raise any error
        return False
    (weight, bias), *others = found
    if weight is None or weight is module._parameters.get("weight"):
        return False
    if not all(_same(weight, w) and _same(bias, b) for w, b in others):
        return False
    before = type(module), module._parameters, module._buffers
    module.__class__ = base
    module._parameters = {"weight": nn.Parameter(weight.detach().clone()), "bias": None}
    module._buffers = {}
    if bias is not None:
        module._parameters["bias"] = nn.Parameter(bias.detach().clone())
    if all(torch.equal(module(x), output) for x, output in zip(inputs, expected, strict=True)):
        return True
    module.__class__, module._parameters, module._buffers = before
    return False


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two tensors are equal, or both None."""
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def _random_inputs(module: Any, base: type[nn.Module]) -> list[Tensor]:
    """Return two inputs for a layer, large enough for its kernel."""
    _, axes = _LAYERS[base]
    if axes is None:
        shape = [2, module.in_features]
    else:
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        shape = [2, module.in_channels, *(2 * (kernel - 1) * dilation + 3 for kernel, dilation in sizes)]
    generator = torch.Generator().manual_seed(0)
    like = next(module.parameters())
    return [torch.randn(shape, generator=generator).to(like) * scale for scale in (1.0, 10.0)]


def _weight_and_bias(module: nn.Module, base: type[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight and the bias with which a module calls its function on `x`; (None, None) if it does anything else."""
    with _Recorder(_LAYERS[base][0]) as recorder:
        output = module(x)
    if len(recorder.calls) != 1:
        return None, None
    read, weight, bias, result = recorder.calls[0]
    return (weight, bias) if read is x and result is output else (None, None)
