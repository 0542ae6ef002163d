"""Super-resolution and restoration: images from images, PSNR and SSIM.

Sources: PSNR = 10 log10(range^2 / MSE) of each image, the mean over images. SSIM: Wang et al. 2004, "Image Quality Assessment:
From Error Visibility to Structural Similarity", eq. (13), with its Gaussian window of 11 x 11 pixels, as torchmetrics
computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.inputs import call_model
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model
from secateur.envs.tasks.supervised import PerSampleTask, shape_of

WINDOW = 11
"""Pixels of SSIM's window."""

LARGEST_PSNR = 100.0
"""In dB, for images without any error."""


@dataclass(frozen=True)
class RestorationConfig:
    """Options.

    Attributes:
        border: pixels at each edge that do not count; papers on super-resolution by a factor s leave out s.
        range: difference between the brightest and the darkest pixel of a target.
        ssim: whether SSIM is reported too; it needs the extra `metrics`.
    """

    border: Annotated[int, Field(ge=0)] = 0
    range: Annotated[float, Field(gt=0)] = 1.0
    ssim: bool = False


@dataclass(frozen=True)
class Restoration(PerSampleTask):
    """Outputs and targets (images, C, H, W) float32; the targets' size may differ from the inputs'."""

    config: RestorationConfig = RestorationConfig()

    @property
    def metric(self) -> Metric:
        """PSNR in dB: 0 dB is an error as large as the range; there is no best value."""
        return Metric("psnr", unit="dB", worst=0.0)

    def statistics(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        """Return PSNR, and SSIM if it is asked for, of each image, (images, 1 or 2)."""
        edge = self.config.border
        found, wanted = (x[..., edge : x.shape[-2] - edge, edge : x.shape[-1] - edge].float() for x in (outputs, targets))
        error = (found - wanted).square().flatten(1).mean(1) / self.config.range**2
        psnr = (-10 * torch.log10(error)).clamp_max(LARGEST_PSNR)
        columns = [psnr, ssim(found, wanted, self.config.range)] if self.config.ssim else [psnr]
        return torch.stack(columns, dim=1).cpu().numpy()

    def summarize(self, statistics: np.ndarray) -> Metrics:
        """Return the mean PSNR, with the mean SSIM if it is asked for."""
        psnr = statistics[:, 0].astype(float)
        others = {"ssim": float(statistics[:, 1].mean())} if self.config.ssim else {}
        return Metrics(float(psnr.mean()), len(statistics), psnr, others)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the mean absolute error, with which EDSR is trained."""
        return F.l1_loss(call_model(model, batch.inputs), batch.targets)

    def check(self, outputs: Any) -> None:
        """Raise InputError unless targets are images, and the output is an image of their shape."""
        for name, split in self.data.splits.items():
            if split.labels.ndim != 4 or split.labels.dtype != np.float32:
                raise InputError(
                    f"`task: restoration` needs images (N, C, H, W) in float32 as targets, but those of `data.{name}` are "
                    f"{split.labels.shape} in {split.labels.dtype}. Set `task`, or check `data.name`."
                )
        wanted = (1, *self.data.validation.labels.shape[1:])
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != wanted:
            shown = shape_of(outputs)
            raise InputError(f"A model for `task: restoration` must give images like the targets, {wanted}, but gives {shown}.")


def ssim(found: Tensor, wanted: Tensor, value_range: float) -> Tensor:
    """Return the structural similarity of each image, (images,), by torchmetrics.

    Raises:
        InputError: if torchmetrics is not installed, or the images are smaller than the window of 11 x 11 pixels.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        needs = "The option `ssim` of `task: restoration` needs torchmetrics: pip install 'secateur[metrics]'"
        raise InputError(f"{needs}, or leave the option out.") from None
    if min(found.shape[-2:]) <= WINDOW:
        raise InputError(f"SSIM needs images larger than {WINDOW} x {WINDOW} pixels: leave the option `ssim` out.")
    similarity = structural_similarity_index_measure(found, wanted, data_range=value_range, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity
