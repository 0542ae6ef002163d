"""Whole heads of attention: which units are found, and that a sliced network computes what the masked dense one computes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.model_graph import analyze
from secateur.envs.pruning.fewer_heads import FewerHeadsAttention
from secateur.envs.pruning.slicing import masked_model, resize_model, set_written_sizes, slice_model, written_sizes
from secateur.envs.pruning.view_sizes import restore_view_sizes, view_sizes

WIDTH, TOKENS = 12, 5


class Stored(nn.Module):
    """Joint projection; numbers of heads and widths are attributes, as in timm."""

    def __init__(self, heads=4, head=3, norm=False, fused=True):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.fused = heads, head, heads * head, fused
        self.scale = head**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * heads * head), nn.Linear(heads * head, WIDTH)
        self.q_norm, self.k_norm = (nn.LayerNorm(head) if norm else nn.Identity() for _ in range(2))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Computed(nn.Module):
    """The width of a head is computed from the width of the input, as in DeiT and Swin; positions have biases."""

    def __init__(self, heads=3):
        super().__init__()
        self.num_heads, self.scale = heads, (WIDTH // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, heads))
        self.register_buffer("places", torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        biases = self.table[self.places.view(-1)].view(n, n, -1).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1)) * self.scale + biases.unsqueeze(0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Separate(nn.Module):
    """A layer for each of queries, keys and values."""

    def __init__(self, heads=3, talking=False):
        super().__init__()
        self.heads, self.width = heads, WIDTH // heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.talk = nn.Linear(heads, heads) if talking else None

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, self.width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bhld,bhsd->bhls", q, k) / self.width**0.5
        if self.talk is not None:
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        mixed = torch.einsum("bhls,bhsd->blhd", scores.softmax(-1), v)
        return self.out(mixed.flatten(2))


class Unequal(nn.Module):
    """Keys and values of unequal width are split within each head, and biases are kept between calls, as in LeViT."""

    def __init__(self, heads=4, key=2, value=4):
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim, self.val_attn_dim = heads, key, value, heads * value
        self.qkv, self.proj = nn.Linear(WIDTH, heads * (2 * key + value)), nn.Linear(heads * value, WIDTH)
        self.biases = nn.Parameter(torch.randn(heads, TOKENS))
        self.register_buffer("places", (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs())
        self.cache = {}

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)

    def forward(self, x):
        b, n, _ = x.shape
        if "biases" not in self.cache:
            self.cache["biases"] = self.biases[:, self.places]
        qkv = self.qkv(x).view(b, n, self.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3))
        scores = q @ k.transpose(-2, -1) * self.key_dim**-0.5 + self.cache["biases"]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.val_attn_dim))


class Rotary(Stored):
    """Queries and keys are rotated by their position."""

    def __init__(self):
        super().__init__(heads=3, head=4)
        self.register_buffer("angles", torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.1]).repeat_interleave(2))

    def rotated(self, x):
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.angles.cos() + turned * self.angles.sin()

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.attn_dim))


class Torch(nn.Module):
    """`nn.MultiheadAttention`."""

    def __init__(self, heads=3, batch_first=True, need_weights=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, heads, batch_first=batch_first, **options)
        self.need_weights = need_weights

    def forward(self, x):
        padding = torch.arange(x.shape[0 if not self.attention.batch_first else 1]) > 3
        padding = padding.expand(x.shape[1 if not self.attention.batch_first else 0], -1)
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


class Model(nn.Module):
    """An embedding, blocks of attention, and a head."""

    def __init__(self, *blocks):
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(4, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in blocks)

    def forward(self, x):
        x = self.first(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.last(x.mean(1))


def built(*blocks):
    torch.manual_seed(0)
    return Model(*(block() for block in blocks)).eval()


def inputs():
    return torch.randn(2, TOKENS, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_exact(model, graph, kept):
    sliced = slice_model(model, graph, kept)
    torch.testing.assert_close(sliced(inputs()), masked_model(model, graph, kept)(inputs()), rtol=1e-4, atol=1e-5)
    return sliced


BLOCKS = {
    "stored": (lambda: Stored(), 4, {"attn_dim": 3, "num_heads": 1}),
    "as many heads as entries": (lambda: Stored(4, 4), 4, {"attn_dim": 4, "num_heads": 1}),
    "normed": (lambda: Stored(norm=True), 4, {"attn_dim": 3, "num_heads": 1}),
    "by hand": (lambda: Stored(fused=False), 4, {"attn_dim": 3, "num_heads": 1}),
    "computed": (lambda: Computed(), 3, {}),
    "separate": (lambda: Separate(), 3, {"heads": 1}),
    "unequal": (lambda: Unequal(), 4, {"val_attn_dim": 4, "num_heads": 1}),
    "rotary": (lambda: Rotary(), 3, {"attn_dim": 4, "num_heads": 1}),
    "torch": (lambda: Torch(), 3, {}),
    "torch, tokens first": (lambda: Torch(batch_first=False, need_weights=True), 3, {}),
    "torch, own widths": (lambda: Torch(kdim=WIDTH, vdim=WIDTH, add_bias_kv=True, bias=False), 3, {}),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_whole_heads_are_units(name):
    block, heads, attributes = BLOCKS[name]
    model = built(block, block)
    graph = analyze(model, (inputs(),))
    assert [group.units for group in graph.groups] == [heads, heads]
    assert {size.name: size.per_unit for size in graph.groups[0].sizes} == attributes
    rng = np.random.default_rng(0)
    for most in (heads, heads - 1):
        kept = [np.sort(rng.choice(heads, rng.integers(1, most + 1), replace=False)) for _ in graph.groups]
        sliced = assert_exact(model, graph, kept)
        assert type(sliced.blocks[0]) is type(model.blocks[0])
        assert sliced.state_dict().keys() == model.state_dict().keys()
    shapes = graph.geometry.shapes([len(units) for units in kept])
    measured = analyze(sliced, (inputs(),), verify=False).geometry.shapes()
    assert shapes.other_macs == measured.other_macs
    assert shapes.weights.sum() + shapes.other_parameters == measured.weights.sum() + measured.other_parameters


def test_heads_that_a_layer_mixes_are_coupled_by_their_common_number():
    model = built(lambda: Separate(talking=True))
    graph = analyze(model, (inputs(),))
    assert [(group.producers, group.units) for group in graph.groups] == [
        (("blocks.0.q", "blocks.0.k", "blocks.0.v", "blocks.0.talk"), 3)
    ]
    assert_exact(model, graph, [np.array([0, 2])])


class OneHead(nn.Module):
    """Attention without heads, as in non-local blocks."""

    def __init__(self, scaled):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.scaled = scaled

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=0.4 if self.scaled else None))


def test_the_width_of_a_single_head_is_prunable_unless_the_scale_depends_on_it():
    model = built(lambda: OneHead(True))
    graph = analyze(model, (inputs(),))
    groups = {group.producers: group.units for group in graph.groups}
    assert groups == {("blocks.0.q", "blocks.0.k"): 6, ("blocks.0.v",): 8}
    assert_exact(model, graph, [np.array([1, 4, 5]), np.array([2, 3])])
    macs = graph.geometry.shapes([[3, 2], [6, 8]]).other_macs
    assert macs.tolist() == [TOKENS**2 * 5, TOKENS**2 * 14]
    graph = analyze(built(lambda: OneHead(False)), (inputs(),))
    assert [group.producers for group in graph.groups] == [("blocks.0.v",)]
    reasons = {frozen.layer: frozen.reason for frozen in graph.frozen}
    assert reasons["blocks.0.q"].startswith("the default scale of scaled_dot_product_attention depends on the width")


def test_the_encoder_of_pytorch_runs_without_some_heads_and_trains():
    layer = nn.TransformerEncoderLayer(WIDTH, 3, 8, batch_first=True)
    model = built(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    graph = analyze(model, (inputs(),))
    assert [group.units for group in graph.groups] == [3, 8, 3, 8]
    sliced = assert_exact(model, graph, [np.array([0, 2]), np.arange(8), np.array([1]), np.arange(8)])
    found = sliced.blocks[0].layers[0].self_attn
    assert type(found) is FewerHeadsAttention and isinstance(found, nn.MultiheadAttention) and found.num_heads == 2
    with torch.no_grad():
        fused = sliced(inputs())
    torch.testing.assert_close(sliced(inputs()), fused)
    sliced.train()(inputs()).sum().backward()
    assert found.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "bias": False}])
def test_attention_with_all_heads_equals_that_of_pytorch(options):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, 3, **options).eval()
    same = copy.deepcopy(dense)
    same.__class__ = FewerHeadsAttention
    x, memory = torch.randn(4, 6, WIDTH), torch.randn(4 if options.get("batch_first") else 7, 6, WIDTH)
    keys = memory.shape[1] if options.get("batch_first") else memory.shape[0]
    mask = torch.rand(6 if options.get("batch_first") else 4, keys) > 0.8
    for given in ({}, {"attn_mask": mask}, {"need_weights": False}, {"average_attn_weights": False}):
        for found, wanted in zip(same(x, memory, memory, **given), dense(x, memory, memory, **given), strict=True):
            assert (found is None and wanted is None) or torch.allclose(found, wanted, atol=1e-6)
    for found, wanted in zip(same(x[0], memory[0], memory[0]), dense(x[0], memory[0], memory[0]), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("block", [Stored, Computed, Torch])
def test_a_network_without_some_heads_is_copied_rebuilt_and_exported(block):
    model = built(block)
    graph = analyze(model, (inputs(),))
    sliced = slice_model(model, graph, [np.array([0, 2])])
    expected = sliced(inputs())
    assert torch.equal(copy.deepcopy(sliced)(inputs()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(sliced))(inputs()), expected)
    rebuilt = built(block)
    set_written_sizes(rebuilt, written_sizes(sliced, graph))
    restore_view_sizes(rebuilt, view_sizes(sliced))
    assert torch.equal(resize_model(rebuilt, sliced.state_dict())(inputs()), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(sliced, (inputs(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    more = torch.randn(3, TOKENS, 4)
    (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), sliced(more), rtol=1e-4, atol=1e-5)
