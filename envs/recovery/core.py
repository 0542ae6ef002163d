"""What a recovery is: a repair of the compressed network without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from envs.model_graph.plan import ModelGraph


class Recovery(Protocol):
    """Repairs a sliced network. Instances are made from their frozen config alone, pickle, and are deterministic."""

    before_quantization: bool
    """True for recoveries that rewrite weights: they run on the sliced float network, so that what they write is
    quantized afterwards. The others run on the quantized network and see its error too."""

    def prepare(self, model: nn.Module, graph: ModelGraph, images: Tensor) -> Any:
        """Return what can be computed once from the dense network; picklable, shared by all candidates.

        Args:
            model: the dense network, in eval mode; left as it is.
            graph: its plan.
            images: calibration images, (N, C, H, W) float32 normalised.
        """
        ...

    def apply(
        self,
        network: nn.Module,
        dense_model: nn.Module,
        graph: ModelGraph,
        kept: Sequence[np.ndarray],
        prepared: Any,
        images: Tensor,
    ) -> None:
        """Repair `network` in place; the dense model is left as it is.

        Args:
            network: the dense model sliced to `kept`, batch norms not folded; may share unsliced tensors with it.
            kept: sorted unit indices of each group.
            prepared: what `prepare` returned.
            images: calibration images, as in `prepare`.
        """
        ...
