"""The structure of a network: `analyze` traces a model and returns its `ModelGraph`."""

from secateur.envs.model_graph.analysis import analyze
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ChannelGroup, FrozenChannels, ModelGraph, TensorSlice

__all__ = ["ChannelGroup", "FrozenChannels", "ModelGraph", "TensorSlice", "analyze", "fold_batch_norms"]
