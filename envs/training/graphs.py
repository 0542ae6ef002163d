"""CUDA graphs: on a GPU, small networks are launched as a whole, because hundreds of small kernels wait for the processor.

A graph holds for one shape of the inputs. The batches of a training have at most two shapes, so it pays there; the candidates
of a search change shapes with every policy, and are never captured.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.envs.quantization.estimators.core import WeightEstimator

log = logging.getLogger(__name__)

MOST_SHAPES = 2
"""Shapes of inputs that are captured; an epoch has batches of at most two sizes."""


class Graphed:
    """A network that is called with one tensor on a GPU, captured as a CUDA graph for each of the first shapes.

    It computes what the network computes, in its mode, with gradients of its parameters where gradients are on. Outputs live
    until the next call. Capture runs the network a few times; its buffers are as before afterwards. Another call than with one
    tensor, a further shape, or a network that cannot be captured: the network itself is called.

    Args:
        network: on a GPU. Its parameters must stay the same tensors, and its mode the same.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._captured: dict[Any, Callable[[Tensor], Any]] = {}
        self._usable = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._usable or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return self.network(*args, **kwargs)
        (x,) = args
        key = (x.shape, x.stride(), x.dtype, self.network.training)
        if key not in self._captured:
            if len(self._captured) == MOST_SHAPES:
                return self.network(x)
            try:
                self._captured[key] = _capture(self.network, x)
            except torch.OutOfMemoryError:
                raise  # batches are halved then
            except RuntimeError as error:
                log.warning("Training goes on without CUDA graphs, which is slower: %s", str(error).splitlines()[0])
                self._usable = False
                return self.network(x)
        return self._captured[key](x)


class _Call(nn.Module):
    """Calls a network; `make_graphed_callables` replaces the `forward` of the module that it gets."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def _capture(network: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    # Where gradients are added up is made here, in the stream of the training; a node made in the stream of the capture would
    # wait for that stream in every step. The captured graph keeps these nodes alive.
    nodes = [torch.autograd.graph.get_gradient_edge(x).node for x in network.parameters() if x.requires_grad]
    before = [buffer.clone() for buffer in network.buffers()]
    call = _Call(network)
    call.training = network.training  # the captured mode; not `train`, which would change the network's modules
    try:
        with warnings.catch_warnings(), _without_collector():
            # The thread of the backward pass makes its CUDA context at the first product, and PyTorch warns of that.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            return torch.cuda.make_graphed_callables(call, (x.detach().clone(),), allow_unused_input=True)
    finally:
        del nodes
        with torch.no_grad():
            for buffer, old in zip(network.buffers(), before, strict=True):
                buffer.copy_(old)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep Python's garbage collector from running: the end of an older graph would break the capture of a new one."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def with_graphs(network: nn.Module, device: torch.device) -> Any:
    """Return what to call in place of a network in a training on a device: itself unless CUDA graphs suit it.

    Estimators of quantized weights change with the progress of a training, which a graph would not see.
    """
    fixed = not any(isinstance(module, WeightEstimator) for module in network.modules())
    return Graphed(network) if device.type == "cuda" and fixed else network
