"""Numbers of channels in the views of a forward pass, e.g. `x.reshape(b, n, heads, c // heads)` with the width `c` of the input.

No attribute of a module can change such a number. A sliced module runs its forward pass in a mode in which views get the new
numbers: a view that requests a dense number on the same axis, and leaves the same axis free, gets the sliced number if that fits
its tensor. Of several possible entries, the one with the most equal sizes is taken. The mode is entered and left by hooks, so the
module keeps its class, and works in training and in exports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.cost_models.core import InputError

ViewEntry = tuple[Sequence[int], Sequence[int]]
"""(sizes that a view requests in the dense network, sizes in the sliced one); -1: free."""

_KEY: Any = "view_sizes"
"""Key of the hooks; PyTorch counts the keys of its own hooks from 0 in every process."""


class _ViewMode(TorchFunctionMode):
    """Changes sizes of views while it is active; it holds no state, so threads can share it.

    Attributes:
        entries: the numbers to change.
    """

    def __init__(self, entries: Sequence[ViewEntry]) -> None:
        super().__init__()
        self.entries = [(tuple(dense), tuple(now)) for dense, now in entries]

    def enter(self, *arguments: Any) -> None:
        """Activate the mode; a forward pre-hook."""
        self.__enter__()

    def leave(self, *arguments: Any) -> None:
        """Deactivate the mode; a forward hook."""
        self.__exit__(None, None, None)

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch, with other sizes if it is a view."""
        kwargs = kwargs or {}
        for sizes in self._changed(_requested(function, args, kwargs)):
            if _fits(args[0], sizes):
                return args[0].view(sizes) if function is Tensor.view else args[0].reshape(sizes)
        return function(*args, **kwargs)

    def _changed(self, sizes: list[Any]) -> list[list[Any]]:
        """Return the sizes to try in place of those that a view requests, the most probable first."""
        found = []
        for dense, now in self.entries:
            if len(sizes) == len(dense):
                equal = [type(size) is int and size == number for size, number in zip(sizes, dense, strict=True)]
                free = [type(size) is int and size == -1 for size in sizes]
                changes = [axis for axis in range(len(dense)) if dense[axis] != now[axis]]
                if free == [number == -1 for number in dense] and all(equal[axis] for axis in changes):
                    changed = [n if n != d else size for size, d, n in zip(sizes, dense, now, strict=True)]
                    found.append((sum(equal), changed))
        return [changed for _, changed in sorted(found, key=lambda item: -item[0])]


def _requested(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the sizes that a view requests; [] if the function is no view."""
    name = getattr(function, "__name__", "")
    if name in ("view", "reshape") and kwargs.keys() <= {"shape", "size"}:
        sizes = [*args[1:], *kwargs.values()]
        sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        return sizes if all(isinstance(size, int) or hasattr(size, "node") for size in sizes) else []
    if name == "unflatten" and len(args) == 3 and not isinstance(args[1], str):
        shape, axis = list(args[0].shape), args[1] % args[0].dim()
        return [*shape[:axis], *args[2], *shape[axis + 1 :]]
    return []


def _fits(tensor: Tensor, sizes: Sequence[Any]) -> bool:
    known = math.prod(size for size in sizes if not (type(size) is int and size == -1))
    if any(type(size) is int and size == -1 for size in sizes):
        return bool(tensor.numel() % known == 0)
    return bool(tensor.numel() == known)


def set_view_sizes(module: nn.Module, entries: Sequence[ViewEntry]) -> None:
    """Change numbers in the views of a module's forward pass, in place; this replaces earlier changes."""
    mode = _ViewMode(entries)
    module._forward_pre_hooks[_KEY] = mode.enter
    module._forward_hooks[_KEY] = mode.leave
    module._forward_hooks_always_called[_KEY] = True  # also if the forward pass raises an error


def view_sizes(model: nn.Module) -> dict[str, list[list[list[int]]]]:
    """Return {path of a module: its entries} of the modules whose views are changed, as JSON can store them."""
    found = {}
    for path, module in model.named_modules():
        hook = module._forward_pre_hooks.get(_KEY)
        if hook is not None:
            mode: Any = hook.__self__
            found[path] = [[list(dense), list(now)] for dense, now in mode.entries]
    return found


def restore_view_sizes(model: nn.Module, stored: Mapping[str, Sequence[Sequence[Sequence[int]]]]) -> None:
    """Set the entries of `view_sizes`, in place.

    Raises:
        InputError: if the model has no such module, or an entry is not a pair of sizes.
    """
    modules = dict(model.named_modules())
    for path, entries in stored.items():
        pairs = all(len(entry) == 2 and len(entry[0]) == len(entry[1]) for entry in entries)
        if path not in modules or not pairs or not all(type(size) is int for entry in entries for part in entry for size in part):
            raise InputError(f"The model has no module `{path}` for the views {entries}: they belong to another architecture.")
        set_view_sizes(modules[path], [(dense, now) for dense, now in entries])
