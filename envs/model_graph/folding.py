"""Folding of batch norms into the layers before them, for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from secateur.envs.weight_layout import as_stored, outputs_first

if TYPE_CHECKING:
    from secateur.envs.model_graph.plan import ModelGraph


@torch.no_grad()
def fold_batch_norms(model: nn.Module, graph: ModelGraph) -> None:
    """Fold each batch norm of `graph.batch_norms` into its layer, in place; the batch norm becomes `nn.Identity`.

    The layer gets new weight and bias tensors, so a model that shares the old ones is not changed. In eval mode the output
    is the same as before. Batch norms that have already been folded are skipped.
    """
    for layer_name, norm_name in graph.batch_norms:
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        if isinstance(norm, nn.Identity):
            continue
        weight, bias = fuse_conv_bn_weights(
            outputs_first(layer), layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        layer.weight, layer.bias = nn.Parameter(as_stored(layer, weight.detach())), nn.Parameter(bias.detach())
        parent, _, child = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity().train(norm.training))
