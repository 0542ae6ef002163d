"""The interface of recoveries: they reduce the error of compression without training."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from secateur.envs.candidate import CandidateNetwork


class Recovery(Protocol):
    """Repairs a candidate. Instances are made from a frozen config only, can be pickled, and are deterministic."""

    after_quantization: ClassVar[bool]
    """False for recoveries that change weights: they run on the sliced float network, whose inputs are already quantized,
    and may quantize layers themselves; the other layers are quantized afterwards. True for recoveries that do not change
    weights and reduce the error of quantization."""

    needs_images: ClassVar[bool]
    """Whether the recovery uses `candidate.calibration` or `candidate.images`."""

    def apply(self, candidate: CandidateNetwork) -> None:
        """Repair `candidate.network` in place. Tensors are replaced, never written into: the dense model may share them."""
        ...


@runtime_checkable
class HasQuickForm(Protocol):
    """A recovery with a cheaper form, which suffices where one choice alone is compressed (envs/sensitivity.py)."""

    def quick(self) -> Recovery:
        """Return the cheaper recovery."""
        ...
