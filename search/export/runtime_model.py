"""An exported ONNX file as a module: a task scores it as it scores the network in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.envs.inputs import Inputs, arguments_of, bound_arguments, call_model, leaves_like
from secateur.search.profiling.runtimes import Session


class RuntimeModel(nn.Module):
    """Runs a session; takes and gives tensors as the network did that was exported.

    Args:
        session: of the exported file.
        network: in PyTorch; it is run once, for the structure of its outputs.
        inputs: a batch for that run.
    """

    def __init__(self, session: Session, network: nn.Module, inputs: Inputs):
        super().__init__()
        self.session, self._network, self._example = session, (network,), arguments_of(inputs)
        with torch.inference_mode():
            self._leaves, self._structure = pytree.tree_flatten(call_model(network, inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of model.onnx, in the structure of the network's."""
        given = leaves_like(bound_arguments(self._network[0], args, kwargs), self._example)
        found = iter(self.session.run(*(leaf.numpy() for leaf in given)))
        leaves = [
            torch.from_numpy(next(found)) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves
        ]  # the rest is constant
        return pytree.tree_unflatten(leaves, self._structure)
