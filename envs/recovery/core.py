"""What a recovery is: a repair of the compressed network without training."""

from __future__ import annotations

from typing import ClassVar, Protocol

from secateur.envs.candidate import CandidateNetwork


class Recovery(Protocol):
    """Repairs a candidate. Instances are made from their frozen config alone, pickle, and are deterministic."""

    after_quantization: ClassVar[bool]
    """False for recoveries that rewrite weights: they see the sliced float network (inputs are on their grids already)
    and may quantize single layers themselves; what they leave in float is quantized after them. True for those that
    leave weights alone and repair what quantization did."""

    needs_images: ClassVar[bool]
    """Whether it uses `candidate.calibration` or `candidate.images`."""

    def apply(self, candidate: CandidateNetwork) -> None:
        """Repair `candidate.network` in place; never write into a tensor, which the dense model may share: replace it."""
        ...
