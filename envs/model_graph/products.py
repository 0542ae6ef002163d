"""Multiply-accumulates of everything that is not a layer: attention, recurrent networks, products with computed weights.

Each operator is executed on tensors without memory (device "meta"). PyTorch splits it into basic operators, and those that
multiply are counted with PyTorch's own formulas (`torch.utils.flop_counter`). Elementwise arithmetic, norms, pooling and
interpolation are not counted, as in published figures. An operator that splits into an operator without a formula, and that is
not in `_WITHOUT_PRODUCTS`, is named: costs that depend on the number of multiply-accumulates would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.envs.model_graph.channel_flow import RULES, is_movement
from secateur.envs.model_graph.product_rules import PRODUCTS
from secateur.envs.model_graph.trace import Trace, calling_module, is_pointwise, op_name, plain_name, run_with, schema_of

_WITHOUT_PRODUCTS = frozenset(
    # creation and copies
    "arange empty empty_like empty_strided eye full full_like linspace new_empty new_full new_ones new_zeros ones ones_like "
    "rand randn randint randperm scalar_tensor zeros zeros_like clone copy _to_copy detach lift_fresh_copy "
    # selection and rearrangement
    "bincount bucketize cat channel_shuffle col2im constant_pad_nd diag_embed embedding flip gather getitem histc im2col index "
    "index_add index_copy index_fill index_put index_select isin masked_scatter masked_select native_channel_shuffle "
    "nonzero one_hot pixel_shuffle pixel_unshuffle put repeat repeat_interleave roll scatter scatter_add scatter_reduce "
    "searchsorted stack take take_along_dim tile tril triu tril_indices triu_indices trace unfold unique unique_consecutive "
    "unsafe_split unsafe_split_with_sizes _unsafe_index _unsafe_view as_strided "
    # order
    "argsort cummax cummin kthvalue median mode msort nanmedian sort topk "
    # sums, norms and probabilities
    "_log_softmax _safe_softmax _softmax cumprod cumsum embedding_bag _embedding_bag log_softmax logcumsumexp softmax "
    "max_unpool2d _native_batch_norm_legit_no_training _native_batch_norm_legit batch_norm group_norm instance_norm layer_norm "
    "local_response_norm native_batch_norm native_group_norm native_layer_norm rms_norm _fused_rms_norm renorm "
    # pooling and interpolation
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator "
    "avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d grid_sampler_2d grid_sampler_3d max_pool2d_with_indices "
    "max_pool3d_with_indices reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d roi_align roi_pool nms upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d linalg_cross "
    # checks and values
    "_assert_async _assert_scalar _assert_tensor_metadata equal item _local_scalar_dense sym_constrain_range_for_size sym_size "
    "sym_numel sym_constrain_range _use_cudnn_ctc_loss allclose is_same_size".split()
)
"""Basic operators, of ATen and torchvision, that do not multiply and accumulate, and are not found by their tags."""


def count_products(trace: Trace) -> tuple[dict[Node, float], tuple[str, ...]]:
    """Return the multiply-accumulates of all operators except the layers, and the operators that cannot be counted.

    Returns:
        {operator: number for one image}, and the operators that cannot be counted with their modules, e.g. "fft_fft2 in `mixer`".
    """
    counts, uncounted = {}, []
    for node in trace.nodes:
        if node in trace.layer_index or _has_no_products(node):
            continue
        found = _count(node)
        if found is None:
            uncounted.append(f"{op_name(node)} in `{calling_module(node)}`" if calling_module(node) else op_name(node))
        else:
            counts[node] = found
    return counts, tuple(dict.fromkeys(uncounted))


def _has_no_products(node: Node) -> bool:
    name = op_name(node)
    if name == "getitem" or (name in RULES and name not in PRODUCTS) or name in _WITHOUT_PRODUCTS:
        return True
    return schema_of(node) is not None and (is_pointwise(node) or is_movement(node))


def _count(node: Node) -> float | None:
    """Return the multiply-accumulates of a node's operator; None if it cannot be counted."""
    if schema_of(node) is None:  # control flow
        return None
    counter = _Counter()
    values = {x: pytree.tree_map_only(Tensor, _without_memory, x.meta.get("val")) for x in node.all_input_nodes}
    try:
        with counter, torch.no_grad():
            run_with(node, values)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
        return None  # the operator has no implementation without memory, or needs values
    return counter.macs if counter.complete else None


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


class _Counter(TorchDispatchMode):
    """Counts the multiply-accumulates of the basic operators that run inside the context.

    Attributes:
        macs: their number so far.
        complete: whether every operator could be counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.complete = 0.0, True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one basic operator and count it."""
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        name = plain_name(operator)
        if operator.overloadpacket in flop_registry:
            # A multiplication and an addition are two operations.
            self.macs += flop_registry[operator.overloadpacket](*args, **kwargs, out_val=result) / 2
        elif name in _FORMULAS:
            self.macs += _FORMULAS[name](result, *(x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)))
        elif name not in _WITHOUT_PRODUCTS and not _is_plain(operator):
            self.complete = False
        return result


def _is_plain(operator: Any) -> bool:
    """Return whether an operator is elementwise, a reduction or a view."""
    returns = operator._schema.returns
    aliases = bool(returns) and all(r.alias_info is not None for r in returns)
    return aliases or bool({torch.Tag.pointwise, torch.Tag.reduction} & set(operator.tags))


_FORMULAS: dict[str, Callable[..., float]] = {
    "dot": lambda result, left, right: left.numel(),
    "vdot": lambda result, left, right: left.numel(),
    "mv": lambda result, matrix, vector: matrix.numel(),
    "addmv": lambda result, added, matrix, vector: matrix.numel(),
    "addbmm": lambda result, added, left, right: left.numel() * right.shape[-1],
    "addr": lambda result, added, left, right: result.numel(),
    "_trilinear": lambda result, left, weight, right: len(left) * weight.numel(),  # nn.Bilinear
    "_cdist_forward": lambda result, left, right: result.numel() * left.shape[-1],
    "deform_conv2d": lambda result, x, weight, *rest: result.numel() * math.prod(weight.shape[1:]),
}
"""Basic operators without a formula in PyTorch: {name: function of the result and the tensors among the arguments}."""
