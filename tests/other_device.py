"""A second device without hardware: tensors stay in main memory, but those that were moved to it are marked.

Within the mode, `Tensor.device` names the device, operations return marked tensors, and whatever a GPU would refuse raises an
error: operations that mix tensors of both devices, and `numpy()` of a marked tensor. Indices on the other device and implicit
copies are refused too, although a GPU allows some of them, because each costs a transfer. Values are the CPU's, bit for bit.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("privateuseone", 0)

MOVES = ("to", "cpu", "cuda")
COPIES = ("copy_", "_has_compatible_shallow_copy_type")
UNREADABLE = ("numpy", "__array__")


class MixedDevicesError(RuntimeError):
    """An operation got tensors of both devices."""


class OtherDevice(TorchFunctionMode):
    """See the top of this file; `operations` counts the operations on the device."""

    def __init__(self):
        super().__init__()
        self._marked = {}
        self.operations = 0

    def is_marked(self, tensor):
        """Whether a tensor is on the device."""
        found = self._marked.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def mark(self, result):
        """Put the tensors of a result on the device."""
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._marked[storage._cdata] = StorageWeakRef(storage)
        return result

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        owner = getattr(getattr(function, "__self__", None), "__name__", "")
        if name == "__get__" and owner == "device":
            return DEVICE if self.is_marked(args[0]) else args[0].device
        if name == "__get__":
            result = function(*args, **kwargs)
            return (
                self.mark(result)
                if owner in ("grad", "data", "mT", "T", "H", "mH", "real") and self.is_marked(args[0])
                else result
            )
        if name == "__set__":
            return function(*args, **kwargs)
        tensors = _tensors(args[:1] if name == "__deepcopy__" else (args, kwargs))  # without what was copied before
        marked = [tensor for tensor in tensors if self.is_marked(tensor)]
        if name in MOVES and isinstance(args[0], Tensor):
            return self._moved(function, name, args, kwargs)
        if name in UNREADABLE and marked:
            raise MixedDevicesError(f"{name} of a tensor on the device")
        created = kwargs.get("device")
        if created is not None and torch.device(created) == DEVICE:
            if kwargs.get("generator") is not None:
                raise MixedDevicesError(f"{name} on the device with a generator of the CPU")
            return self.mark(function(*args, **{**kwargs, "device": torch.device("cpu")}))
        if created is not None:
            return function(*args, **kwargs)
        if not marked:
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise MixedDevicesError(f"{name} on the device with a generator of the CPU")
        scalars_too = name in ("cat", "stack", "concat")
        foreign = [x for x in tensors if not self.is_marked(x) and (x.dim() or scalars_too)]
        if foreign and name not in COPIES:
            raise MixedDevicesError(
                f"{name} of tensors on both devices: {[(tuple(x.shape), self.is_marked(x)) for x in tensors]}"
            )
        self.operations += 1
        result = function(*args, **kwargs)
        if name in COPIES:
            return result
        return self.mark(result)

    def _moved(self, function, name, args, kwargs):
        """Run `to`, `cpu` or `cuda` of a tensor."""
        source, target = args[0], None
        if name != "to":
            target = torch.device(name)
        given = [*args[1:], *kwargs.values()]
        for value in given:
            if isinstance(value, torch.device | str):
                target = torch.device(value)
            elif isinstance(value, Tensor):
                target = DEVICE if self.is_marked(value) else value.device
        now = self.is_marked(source)
        onto = now if target is None else target.type == DEVICE.type
        plain = [torch.device("cpu") if isinstance(value, torch.device | str) else value for value in args[1:]]
        plain_kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        result = source.to(*plain, **plain_kwargs) if name == "to" else source
        if onto != now and result.untyped_storage()._cdata == source.untyped_storage()._cdata:
            result = result.clone(memory_format=torch.preserve_format)
        return self.mark(result) if onto else result


def _tensors(tree):
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _tensors(value)]
    if isinstance(tree, tuple | list):
        return [tensor for value in tree for tensor in _tensors(value)]
    return []
