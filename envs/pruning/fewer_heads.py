"""`nn.MultiheadAttention` without some of its heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeadsAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads together are narrower than `embed_dim`.

    PyTorch's own forward pass requires `num_heads * head_dim == embed_dim`. Slicing gives a module without some of its heads this
    class; names of tensors, attributes, arguments and results stay the same, and `num_heads` is the number of kept heads. Masks
    with one entry per head are not supported.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and weights, see `nn.MultiheadAttention.forward`."""
        batched, one_source = query.dim() == 3, query is key and key is value
        operands = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not self.batch_first:
            operands = [x.transpose(0, 1) for x in operands]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self._projected(one_source, *operands))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = _added_mask(key_padding_mask, attn_mask, q)
        if mask is not None and k.shape[2] > mask.shape[-1]:  # bias_k is a further token
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights

    def _projected(self, one_source: bool, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (batch, tokens, heads * head width)."""
        if self.in_proj_weight is not None and one_source:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            stacked = self.in_proj_weight is not None
            kernels = self.in_proj_weight.chunk(3) if stacked else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), kernels, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], 1)
        return [q, k, v]


def _added_mask(padding: Tensor | None, attention: Tensor | None, like: Tensor) -> Tensor | None:
    """Return both masks as one that is added to the scores, (batch, 1, tokens, tokens) or broadcastable to it."""
    masks = [] if padding is None else [padding[:, None, None, :]]
    if attention is not None:
        masks.append(attention)
    floats = [torch.zeros_like(m, dtype=like.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m for m in masks]
    return sum(floats[1:], floats[0]) if floats else None


def remove_heads(module: nn.MultiheadAttention) -> None:
    """Set the number of heads from the shape of the weights, in place; with fewer heads the class is `FewerHeadsAttention`."""
    stacked = module.in_proj_weight
    rows = module.q_proj_weight.shape[0] if stacked is None else stacked.shape[0] // 3
    module.num_heads = rows // module.head_dim
    if rows != module.embed_dim and type(module) is nn.MultiheadAttention:
        module.__class__ = FewerHeadsAttention
        module._qkv_same_embed_dim = False  # the fused kernel of `nn.TransformerEncoderLayer` cannot run it
