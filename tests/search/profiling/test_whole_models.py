"""Versions of a network that are made by slicing an ONNX model."""

import copy

import numpy as np
import pytest
import torch

from secateur.envs.pruning.slicing import slice_model
from secateur.search.profiling.runtimes import open_session
from secateur.search.profiling.whole_models import CompressedModels, export_dense, make_distinct, random_widths


@pytest.fixture(scope="module")
def dense(subject):
    """The exported network; it must be left alone, like the network itself."""
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    exported = export_dense(subject.model, subject.graph, subject.image_shape, batch=2)
    content = exported.onnx_model.SerializeToString()
    yield exported
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert exported.onnx_model.SerializeToString() == content


@pytest.fixture(scope="module")
def floats(subject, dense):
    return CompressedModels(dense, subject.graph)


def sliced_logits(models, widths):
    network = slice_model(models._model, models._graph, [np.arange(width) for width in widths])
    with torch.inference_mode():
        return network(torch.from_numpy(models.image)).numpy()


def test_the_sliced_model_computes_what_the_sliced_module_computes(floats, subject):
    assert floats.sliceable
    for widths in random_widths(subject.graph, 4, np.random.default_rng(0)):
        (logits,) = open_session(floats.version(widths)).run(floats.image)
        np.testing.assert_allclose(logits, sliced_logits(floats, widths), rtol=1e-4, atol=1e-5)


def test_where_slicing_fails_every_version_is_exported(floats, subject, monkeypatch):
    monkeypatch.setattr(floats, "sliceable", False)
    widths = [max(1, group.units // 2) for group in subject.graph.groups]
    (logits,) = open_session(floats.version(widths)).run(floats.image)
    np.testing.assert_allclose(logits, sliced_logits(floats, widths), rtol=1e-4, atol=1e-5)


def test_the_sliced_int8_model_stays_close_to_the_module(subject, dense):
    models = CompressedModels(dense, subject.graph, "int8")
    assert models.sliceable
    widths = [group.units for group in subject.graph.groups]
    expected = sliced_logits(models, widths)
    (logits,) = open_session(models.version(widths)).run(models.image)
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max() + 1e-3
    half = [max(1, width // 2) for width in widths]
    assert open_session(models.version(half)).run(models.image)[0].shape == (2, 5)
    assert len(models.version(half)) < len(models.version(widths))


def test_equal_vectors_become_distinct(subject):
    network = copy.deepcopy(subject.model)
    make_distinct(network)
    vectors = [tuple(t.tolist()) for t in network.state_dict().values() if t.dim() == 1 and t.is_floating_point()]
    assert len(set(vectors)) == len(vectors)


def test_random_widths_are_valid_and_spread(subject):
    versions = np.array(random_widths(subject.graph, 40, np.random.default_rng(0)))
    units = np.array([group.units for group in subject.graph.groups])
    assert versions.shape == (40, len(units))
    assert (versions >= 1).all() and (versions <= units).all()
    share = (versions / units).mean(axis=1)
    assert share.min() < 0.35 and share.max() > 0.85
