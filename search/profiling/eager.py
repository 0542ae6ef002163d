"""Layers and whole networks in eager PyTorch, to profile deployments without an export."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.pruning.slicing import slice_model
from secateur.search.profiling.layer_models import LayerPoint
from secateur.search.profiling.runtimes import LEAST_REPEATS, WARM_UP


class EagerLayers:
    """Times layers as module calls, each with its ReLU."""

    def __init__(self, threads: int, batch: int, seconds: float, repeats: int):
        self._batch, self._seconds, self._repeats = batch, seconds, repeats
        torch.set_num_threads(threads)

    @torch.inference_mode()
    def times(self, points: Sequence[LayerPoint], precision: str) -> list[np.ndarray]:
        """Return milliseconds of each call, (repeats,), of each point; the points take turns."""
        dtype = getattr(torch, precision)
        calls = [(_module(point).to(dtype), torch.ones(point.input_shape(self._batch), dtype=dtype)) for point in points]
        rounds: list[list[float]] = []
        started = time.process_time()
        while len(rounds) < self._repeats:
            if len(rounds) >= WARM_UP + LEAST_REPEATS and time.process_time() - started > self._seconds:
                break
            rounds.append([_seconds(module, inputs) for module, inputs in calls])
        return list(1e3 * np.array(rounds[WARM_UP:]).T)


class SlicedModules:
    """The versions of one network that slicing gives, as modules with folded batch norms; arguments as `export_dense`."""

    def __init__(self, model: nn.Module, graph: ModelGraph, image_shape: Sequence[int], batch: int):
        self._model, self._graph = copy.deepcopy(model), graph
        self.image = np.random.default_rng(0).standard_normal((batch, *image_shape), np.float32)

    def version(self, widths: Sequence[int]) -> nn.Module:
        """Return the network in which each group keeps this many units."""
        network = slice_model(self._model, self._graph, [np.arange(width) for width in widths])
        fold_batch_norms(network, self._graph)
        return network


def _module(point: LayerPoint) -> nn.Module:
    kind, kernel, stride, _, _ = point.key
    layer: nn.Module
    if kind == "linear":
        layer = nn.Linear(point.in_channels, point.out_channels)
    else:
        layer = nn.Conv2d(point.in_channels, point.out_channels, kernel, stride, point.padding, groups=point.conv_groups)
    return nn.Sequential(layer, nn.ReLU(inplace=True)).eval()


def _seconds(module: nn.Module, inputs: torch.Tensor) -> float:
    started = time.perf_counter()
    module(inputs)
    return time.perf_counter() - started
