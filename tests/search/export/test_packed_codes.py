"""Codes, scales and tables of levels come back from a file as they were, for every quantizer."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph import analyze
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.fake_quantize import quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.tasks.synthetic import synthetic_net
from secateur.search.export.files import LEVELS
from secateur.search.export.load import restore_layers
from secateur.search.export.write import layer_entries, packed_tensors


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_read_back_computes_the_same_bit_for_bit(name, tmp_path):
    torch.manual_seed(0)
    model, images = synthetic_net().eval(), torch.randn(20, 3, 8, 8)
    graph = analyze(model, (images[:1],))
    calibration = calibrate(model, graph, images, CalibrationConfig())
    config, make = QUANTIZERS[name]
    bits = {"conv1": (8, 32), "conv2": (2, 4), "conv3": (3, 8), "conv4": (32, 6), "linear": (5, 32)}
    kept = [np.arange(group.units) for group in graph.groups]
    candidate = CandidateNetwork(
        copy.deepcopy(model), model, graph, kept, bits, make(config()), calibration, images, PieceCache()
    )
    candidate.quantize_inputs()
    candidate.quantize_weights()
    network = candidate.network

    packed = packed_tensors(network)
    save_file(packed, tmp_path / "weights")
    restored = synthetic_net().eval()
    restore_layers(restored, load_file(tmp_path / "weights"), json.loads(json.dumps(layer_entries(network))))
    assert torch.equal(restored(images), network(images))
    for layer, (weight_bits, _) in bits.items():
        before, after = (quantized_weight(part.get_submodule(layer)) for part in (network, restored))
        assert (before is None) == (after is None) == (weight_bits == 32)
        if before is not None:
            assert torch.equal(after.codes, before.codes) and after.bits == before.bits
            assert packed[f"{layer}.weight.codes"].numel() == -(-before.codes.numel() * weight_bits // 8)
            assert (layer + LEVELS in packed) == (before.levels is not None)
    assert (f"conv2{LEVELS}" in packed) == (name not in ("uniform", "dual_bounds"))
