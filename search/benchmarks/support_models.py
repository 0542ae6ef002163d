"""The models of `secateur support`: torchvision's classifiers, and models of timm and for other tasks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from secateur.cost_models.core import InputError
from secateur.envs.model_graph.plain_layers import make_weights_plain

PARAMETER_LIMIT = 100_000_000
"""All 63 classifiers with at most this many parameters are checked, ..."""
LARGER = ("vgg16", "regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf")
"""... and these 4 above the limit."""

TIMM = (
    "cait_xxs24_224 convnext_atto convnextv2_atto crossvit_tiny_240 cspresnet50 deit3_small_patch16_224 dla46_c ecaresnet26t "
    "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 ese_vovnet19b_dw eva02_tiny_patch14_224 "
    "fastvit_t8 fasternet_t0 ghostnet_050 gmlp_ti16_224 hrnet_w18_small inception_next_atto levit_128s mixer_s32_224 mixnet_s "
    "mobilenetv4_conv_small mobileone_s0 mobilevit_xxs nf_resnet26 nfnet_l0 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 "
    "res2net50_26w_4s resmlp_12_224 resnetv2_50x1_bit skresnet18 swin_tiny_patch4_window7_224 tiny_vit_5m_224 "
    "vit_tiny_patch16_224 xcit_nano_12_p16_224"
).split()
"""40 small models of timm, one of each family."""

SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
DETECTION = (
    *("fasterrcnn_mobilenet_v3_large_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
"""Detectors; their part `backbone` is checked."""
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
FLOW = ("raft_small",)
IMAGE, CLIP = (1, 3, 128, 128), (1, 3, 16, 64, 64)
"""Shapes of the inputs for models other than classifiers; RAFT gets two images."""
LARGER_INPUTS = {"ssd300_vgg16": (1, 3, 300, 300), "s3d": (1, 3, 16, 224, 224)}
"""Networks whose last layers have nothing left of smaller inputs."""


@dataclass(frozen=True)
class CheckedModel:
    """A model with random weights in eval mode.

    Attributes:
        model: the model.
        inputs: example inputs, one of each.
        published_macs: the published number of multiply-accumulates; NaN: none.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    published_macs: float = float("nan")


def classifiers() -> list[str]:
    """Return the names of torchvision's classifiers of the support matrix."""
    found = []
    for name in torchvision.models.list_models(module=torchvision.models):
        size = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        if size <= PARAMETER_LIMIT or name in LARGER:
            found.append(name)
    return found


def others() -> list[str]:
    """Return the names of the models of the second table; those of timm only if it is installed."""
    names = [f"{kind}/{name}" for kind, found in _TORCHVISION.items() for name in found]
    return names + ([f"timm/{name}" for name in TIMM] if importlib.util.find_spec("timm") else [])


def build_checked(name: str) -> CheckedModel:
    """Return a model by its name in the support matrix: one of torchvision's classifiers, or "timm/resnet26d"."""
    kind, _, rest = name.rpartition("/")
    return _BUILDERS[kind](rest)


def check_name(name: str) -> None:
    """Raise InputError if no model has this name."""
    kind, _, rest = name.rpartition("/")
    if kind == "timm" and importlib.util.find_spec("timm") is None:
        raise InputError(f"{name!r} needs timm. Install it: pip install timm.")
    known = {"": torchvision.models.list_models(module=torchvision.models), "timm": [rest], **_TORCHVISION}
    if rest not in known.get(kind, ()):
        raise InputError(f"torchvision has no classifier {name!r}. See torchvision.models.list_models().")


def _classifier(name: str) -> CheckedModel:
    # The auxiliary heads run in training only; the analysis sees eval mode.
    arguments = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    weights = torchvision.models.get_model_weights(name).DEFAULT
    model = torchvision.models.get_model(name, weights=None, **arguments).eval()
    size = weights.transforms().crop_size[0]
    return CheckedModel(model, (torch.zeros(1, 3, size, size),), weights.meta["_ops"] * 1e9)


def _of_timm(name: str) -> CheckedModel:
    timm: Any = importlib.import_module("timm")  # optional
    model: Any = timm.create_model(name).eval()
    make_weights_plain(model)
    return CheckedModel(model, (torch.zeros(1, *model.default_cfg["input_size"]),))


def _torchvision(*shapes: tuple[int, ...]) -> Callable[[str], CheckedModel]:
    def build(name: str) -> CheckedModel:
        options = {"weights_backbone": None} if name in (*SEGMENTATION, *DETECTION) else {}
        model = torchvision.models.get_model(name, weights=None, **options).eval()
        if name in DETECTION:
            model = model.backbone
        return CheckedModel(model, tuple(torch.zeros(LARGER_INPUTS.get(name, shape)) for shape in shapes))

    return build


_TORCHVISION = {"segmentation": SEGMENTATION, "detection": DETECTION, "video": VIDEO, "flow": FLOW}
_BUILDERS: dict[str, Callable[[str], CheckedModel]] = {
    "": _classifier,
    "timm": _of_timm,
    "segmentation": _torchvision(IMAGE),
    "detection": _torchvision(IMAGE),
    "video": _torchvision(CLIP),
    "flow": _torchvision(IMAGE, IMAGE),
}
"""{kind of a name: function that builds the model}."""
