"""Least squares in sequence: each layer is refitted on its inputs in the compressed network, with the dense network's targets.

There is one forward pass of the compressed network over the calibration images. Just before a layer runs, its weight W and
its intercept are replaced by those with the smallest error to the dense output; the pass continues with them. With the layer's
inputs u' at sampled positions (after pruning, refits and rounding of all earlier layers, and after the quantization of the
layer's own input) and the dense network's value t at the same positions,

    W' = W + E[e u'^T] (E[u' u'^T] + lambda I)^-1,    e = t - W u',    u', e centered,                              (1)

the minimizer of E|W' u' - t|^2 + lambda |W' - W|^2 with a free intercept. The refit compensates the errors of earlier layers;
they do not accumulate. A layer with weight bits is quantized immediately (quantizers that round with compensation get the
moments of u'), and the intercept compensates the mean rounding error. In addition:

- sums: if the only reader of the layer's output (or its batch norm's output) is a sum whose other operand is already computed,
  the target is the dense SUM minus the compressed network's other operand: the error of a residual stream is compensated too;
- clipping: if the only reader of the target is a ReLU or ReLU6, errors of clipped values do not count. The squared error after
  clipping is reduced in alternating steps: with W' fixed, values that are clipped in both networks get the current value as
  their target; then eq. (1) is solved again.

Source: He et al. 2017 (channel pruning), arXiv:1707.06168 (whole-model pruning: inputs of the compressed network, targets of
the dense network; the same for residual branches); Zhang et al. 2015, arXiv:1505.06798 (the asymmetric reconstruction with
nonlinearity, solved in alternating steps).

Where we differ and why:
1. All layers are refitted, not only readers of pruned channels, because every layer can compensate errors of earlier layers.
2. The damping term keeps the weights near the current weights; the intercept is free. Several dampings are tried on four
   fifths of the samples, and the one with the smallest error on the last fifth is used; if no damping reduces this error, the
   weight is kept. Fewer samples than unknowns (a classifier has one position per image) are therefore no problem.
3. There is no penalty between target and auxiliary variable as in Zhang et al.: clipped entries that agree have no error.
4. In a sum, the operand that is computed last compensates the error (for example a convolution on a shortcut that runs after
   the branch).
5. Batch norms without running statistics use those of the batch: a layer before one is refitted to its own dense outputs.
6. There is one batch, because every layer needs the refitted inputs of all images. `max_bytes` limits its memory: networks
   with large activations use fewer images and more positions of each image, so a layer has the same number of samples.

Layers that are not refitted in the pass: layers that run several times or never, layers without moments in the calibration
(forward passes of their own, weights with several users), layers whose first axis is not the axis of the images. Those of them
that read pruned channels and have moments are refitted before the pass, as by `least_squares`. For layers with more than
`max_inputs` unknowns per output, only the intercept is refitted. If the forward pass of a candidate calls other functions than
the dense network's, layers after the difference are not refitted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.cost_models.core import FLOAT_BITS, Count, Positive, Range, check_fields
from secateur.envs.calibration.core import FULL, NONE, LayerStatistics, required
from secateur.envs.calibration.patches import outputs_at, patches, sample_positions
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.inputs import call_model, map_inputs
from secateur.envs.recovery.common.forward_values import ForwardPlan, Target, ValueObserver, observing, plan_forward
from secateur.envs.recovery.core import Recovery
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.envs.weight_layout import outputs_first

log = logging.getLogger(__name__)

_FLOAT_BYTES = 4
_IMAGES_PER_CHUNK = 64
"""Number of images with the same sampled positions; they are one batch of the dense network."""

_ROUNDING = 1e-5
"""If all errors are below this share of the largest value, they are rounding errors, and the layer is not refitted."""

_FREE_UNKNOWNS = 100
"""Added to a layer's number of unknowns when the number of samples is limited, so that depthwise convolutions get samples."""

_MAX_PATCH_BYTES = 256_000_000
"""Memory limit for the inputs of one layer at the sampled positions, in bytes; it limits the samples."""

_DAMPING_STEPS = (1, 30, 1000)
"""Multiples of the smallest damping; the held-out samples decide which one is used."""

_HELD_OUT = 5
"""One of this many samples is held out."""

_STRIP = 64
"""Products with fewer columns than four times this are not split."""

_LEAST_SLOPE = 1e-3
"""Outputs whose batch-norm factor is below this share of the largest factor are not refitted."""


@dataclass(frozen=True)
class SequentialConfig:
    """Configuration of the refits.

    Attributes:
        damping: the smallest lambda, relative to the mean of the diagonal of E[u' u'^T].
        max_images: largest number of calibration images.
        samples: number of sampled positions per layer, over all images.
        clip_rounds: number of further solutions of eq. (1) for targets that ReLU clips.
        max_inputs: largest number of unknowns per output for which weights are refitted.
        max_bytes: approximate memory limit for the activations of the pass, in bytes; it limits the number of images.
        max_target_bytes: memory limit for the dense network's values, which are stored for all candidates; it limits the
            samples.
        seed: random seed for sampling positions.
    """

    damping: Positive = 1e-3
    max_images: Count = 500
    samples: Count = 16_000
    clip_rounds: Annotated[int, Range(least=0)] = 2
    max_inputs: Count = 4608
    max_bytes: Count = 1_000_000_000
    max_target_bytes: Count = 200_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `sequential`")


@dataclass(frozen=True)
class Sequential:
    """Refits convolutions, with any number of groups, and linear layers in one pass; see the top of this file."""

    config: SequentialConfig = SequentialConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    def quick(self) -> Recovery:
        """Return `least_squares`: it refits the readers of pruned channels alone, in a fraction of the time."""
        return LeastSquares()

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        # The caller may be in inference mode, but new parameters must be trainable later.
        with torch.inference_mode(False), torch.no_grad():
            targets = candidate.cache.get(
                ("sequential", self.config, candidate.parts), lambda: dense_targets(candidate, self.config)
            )
            LeastSquares().refit_readers(candidate, without=targets.values)
            _Pass(candidate, targets, self.config).run()


@dataclass(frozen=True)
class DenseTargets:
    """The targets of the refits.

    Attributes:
        plan: functions and targets of the dense network's forward pass.
        positions: {layer: sampled output positions of each chunk of images}.
        values: {layer: (samples, dense outputs) float32}, ordered by image.
        images: number of images.
    """

    plan: ForwardPlan
    positions: Mapping[str, tuple[Tensor, ...]]
    values: Mapping[str, Tensor]
    images: int


def dense_targets(candidate: CandidateNetwork, config: SequentialConfig) -> DenseTargets:
    """Return the dense network's values, from one pass over the images."""
    model, modules, hidden = candidate.dense_model, candidate.dense_layers, _layer_modules(candidate, candidate.dense_layers)
    all_images = candidate.given_images()
    plan = plan_forward(model, _refittable(candidate), hidden, all_images[:1])
    images = all_images[: _images_at_once(candidate, config)]
    chunks = images.split(_IMAGES_PER_CHUNK)
    # With statistics of the batch, the values of an image depend on the batch: it is the batch of the compressed network's pass.
    batches = (images,) if any(map(_uses_batch_statistics, modules.values())) else chunks
    rng = np.random.default_rng(config.seed)
    positions = {
        name: tuple(sample_positions(_num_positions(modules[name], target), most, rng) for _ in chunks)
        for (name, target), most in zip(plan.targets.items(), _sample_sizes(modules, plan, len(images), config), strict=True)
    }
    readers = _by_value({name: target.value for name, target in plan.targets.items()})
    values: dict[str, list[Tensor]] = {name: [] for name in positions}
    by_image: set[str] = set()

    def check(number: int, value: Tensor) -> None:
        by_image.update(name for name in readers.get(number, ()) if _is_by_image(value, plan.targets[name].sample))

    def take(number: int, value: Tensor) -> None:
        for name in by_image.intersection(readers.get(number, ())):
            for part in value.split(_IMAGES_PER_CHUNK * len(plan.targets[name].sample)):
                sampled = positions[name][len(values[name])].to(part.device)
                values[name].append(outputs_at(modules[name], part, sampled).flatten(0, 1))

    for on_value, batch in (
        (check, map_inputs(lambda x: x.repeat_interleave(2, 0), images[:1])),
        *((take, batch) for batch in batches),
    ):
        with observing(ValueObserver(plan.functions, on_value), hidden):
            call_model(model, batch)
    complete = {name: torch.cat(parts) for name, parts in values.items() if len(parts) == len(chunks)}
    return DenseTargets(plan, {name: positions[name] for name in complete}, complete, len(images))


def _layer_modules(candidate: CandidateNetwork, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return the modules of the layers; they may have a pre-hook that quantizes their input."""
    return {layer.name: modules[layer.name] for layer in candidate.graph.geometry.layers if layer.name in modules}


def _refittable(candidate: CandidateNetwork) -> dict[str, str | None]:
    """Return {layer: its batch norm or None} of the layers that can be refitted if they run once."""
    calibrated = required(candidate.calibration, "a calibration").layers
    known = [name for name, layer in calibrated.items() if layer.kind != NONE]
    return {name: candidate.batch_norms.get(name) if candidate.norm(name) is not None else None for name in known}


def _images_at_once(candidate: CandidateNetwork, config: SequentialConfig) -> int:
    """Return the number of images for which the activations fit into memory.

    Eager layers need twice the memory of the geometry's buffers, because batch norms do not work in place.
    """
    geometry = candidate.graph.geometry
    elements = geometry.buffer_fixed + geometry.group_units @ geometry.buffer_per_unit
    peak = 2 * _FLOAT_BYTES * float((geometry.live @ elements).max(initial=1.0))
    return max(1, min(config.max_images, len(candidate.given_images()), int(config.max_bytes / peak)) // candidate.parts)


def _num_positions(layer: nn.Module, target: Target) -> int:
    """Return the number of positions (tokens) for each entry of the first axis of one image's value."""
    shape = target.sample.shape
    return int(np.prod(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]))


def _sample_sizes(modules: Mapping[str, Any], plan: ForwardPlan, images: int, config: SequentialConfig) -> list[int]:
    """Return the number of sampled positions of each layer per entry of the first axis.

    If memory is limited, the number of samples per unknown is equal for all layers: layers with more unknowns get more samples.
    """
    sizes = []
    for name, target in plan.targets.items():
        layer, entries = modules[name], images * len(target.sample)
        weight = outputs_first(layer)
        unknowns = weight[0].numel()
        patch_bytes = _FLOAT_BYTES * unknowns * getattr(layer, "groups", 1)
        most = min(config.samples, entries * _num_positions(layer, target), _MAX_PATCH_BYTES / patch_bytes)
        sizes.append((entries, _FLOAT_BYTES * len(weight), most, unknowns + _FREE_UNKNOWNS))
    table = np.array(sizes, dtype=float).reshape(-1, 4)
    all_entries, target_bytes, limits, weights = table.T
    per_unknown = config.samples / _FREE_UNKNOWNS
    while target_bytes @ np.minimum(limits, per_unknown * weights) > config.max_target_bytes and per_unknown > 1e-3:
        per_unknown *= 0.9
    return np.ceil(np.minimum(limits, per_unknown * weights) / all_entries).astype(int).tolist()


def _by_value(numbers: Mapping[str, int | None]) -> dict[int, list[str]]:
    """Return {number: layers}."""
    layers: dict[int, list[str]] = {}
    for name, number in numbers.items():
        if number is not None:
            layers.setdefault(number, []).append(name)
    return layers


def _is_by_image(value: Tensor, sample: Tensor) -> bool:
    """Return whether the first axis of a value is the axis of the images, possibly with several entries per image.

    Args:
        value: for a batch of two copies of the first image: statistics of this batch are those of the image alone.
        sample: the value for the first image.
    """
    if len(value) != 2 * len(sample) or value.shape[1:] != sample.shape[1:]:
        return False
    return bool((value - torch.cat([sample, sample])).abs().max() <= 1e-2 * sample.abs().max())


def _uses_batch_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None


class _Pass:
    """The forward pass of the compressed network; every layer is refitted before it runs."""

    def __init__(self, candidate: CandidateNetwork, dense: DenseTargets, config: SequentialConfig) -> None:
        self.candidate, self.dense, self.config = candidate, dense, config
        self.targets = {name: dense.plan.targets[name] for name in dense.values}
        self.waiting = _by_value({name: target.other for name, target in self.targets.items()})
        self.others: dict[str, Tensor] = {}
        self.observer = ValueObserver(dense.plan.functions, self.keep)

    def run(self) -> None:
        """Refit all layers."""
        layers, images = self.candidate.layers, self.candidate.given_images()[: self.dense.images]
        # These hooks run after the existing pre-hooks, so the input is already quantized.
        hooks = [layers[name].register_forward_pre_hook(partial(self.refit, name)) for name in self.targets]
        try:
            with observing(self.observer, _layer_modules(self.candidate, layers)):
                call_model(self.candidate.network, images)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.observer.agrees:
            log.warning("the compressed network's forward pass differs from the dense one's: some layers were not refitted")

    def keep(self, number: int, value: Tensor) -> None:
        """Store values that will be added to the outputs of layers that have not yet run."""
        for name in self.waiting.get(number, ()):
            parts = zip(self._chunks(name, value), self.dense.positions[name], strict=True)
            self.others[name] = torch.cat(
                [outputs_at(self.candidate.layers[name], part, at.to(part.device)).flatten(0, 1) for part, at in parts]
            )

    def _chunks(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(_IMAGES_PER_CHUNK * len(self.targets[name].sample))

    def refit(self, name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Replace the weight and intercept of a layer that is about to run on these inputs."""
        target = self.targets[name]
        if not self.observer.agrees or (target.other is not None and name not in self.others):
            return
        candidate = self.candidate
        parts = zip(self._chunks(name, inputs[0]), self.dense.positions[name], strict=True)
        size = target.sample.shape[2:]
        rows = torch.cat([patches(layer, part, at.to(part.device), size).flatten(0, 1) for part, at in parts])
        kept = torch.from_numpy(candidate.kept_axes(name).outputs).to(rows.device)
        wanted, other = self.dense.values[name], self.others.pop(name, None)
        wanted = wanted if len(kept) == wanted.shape[1] else wanted.index_select(1, kept)
        fit = _LayerFit(layer, candidate.norm(name), rows, wanted, other, candidate.has_intercept(name))
        quantized = candidate.layer_bits.get(name, (FLOAT_BITS,))[0] < FLOAT_BITS
        if fit.is_exact() and not quantized:
            return
        statistics = None
        if fit.inputs.shape[2] <= self.config.max_inputs:
            fit.solve(self.config.damping, target.clip, self.config.clip_rounds)
            candidate.set_weight(name, fit.weight.float().reshape(outputs_first(layer).shape))
            statistics = fit.statistics(required(candidate.calibration, "a calibration").layers.get(name))
        else:
            fit.move_center()
        if quantized:
            candidate.quantize(name, statistics)
        if fit.has_intercept:
            candidate.shift(name, fit.shift(outputs_first(layer)))
            if quantized:  # the mean rounding error is compensated; a bias correction must not correct it again
                candidate.float_weights[name] = layer.weight.detach()


class _LayerFit:
    """The regression of one layer: its weight (conv_groups, outputs per group, n), its inputs and its target.

    Args:
        layer: the layer before the refit.
        norm: the batch norm after it, or None.
        rows: inputs of the layer, (samples, conv_groups, n).
        wanted: target, the dense network's value, (samples, outputs).
        other: other operand of the sum if the target is a sum, (samples, outputs); None: the target is no sum.
        has_intercept: whether the layer's output can be shifted.
    """

    def __init__(self, layer: Any, norm: Any, rows: Tensor, wanted: Tensor, other: Tensor | None, has_intercept: bool) -> None:
        self.norm, self.wanted, self.other, self.has_intercept = norm, wanted, other, has_intercept
        groups = rows.shape[1]
        self.weight = outputs_first(layer).view(groups, -1, rows.shape[2]).double()
        self.bias = rows.new_zeros(self.weight.shape[:2]) if layer.bias is None else layer.bias.view(groups, -1)
        inputs = rows.transpose(0, 1)  # (conv_groups, samples, n)
        mean = inputs.mean(1, keepdim=True) if has_intercept else rows.new_zeros(groups, 1, rows.shape[2])
        self.inputs, self.mean = inputs - mean, mean[:, 0].double()
        self.center = self._product(self.weight) + self.bias  # output for the mean input
        self.slope = rows.new_ones(self.weight.shape[:2].numel())
        if norm is not None:
            self.slope = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
        self.covariance: Tensor | None = None

    def _product(self, weight: Tensor) -> Tensor:
        """Return the product of a weight and the mean input, (conv_groups, outputs per group)."""
        return (weight @ self.mean[:, :, None])[:, :, 0]

    def value(self) -> Tensor:
        """Return the value with the current weight and center, (samples, outputs)."""
        outputs = torch.baddbmm(self.center.float()[:, None], self.inputs, self.weight.float().transpose(1, 2))
        value = outputs.transpose(0, 1).flatten(1)
        if (norm := self.norm) is not None:
            value = F.batch_norm(value, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return value if self.other is None else value + self.other

    def is_exact(self) -> bool:
        """Return whether the value differs from the target by rounding errors only."""
        return bool((self.wanted - self.value()).abs().max() <= _ROUNDING * self.wanted.abs().max())

    def error(self, clip: tuple[float, float] | None) -> Tensor:
        """Return target minus value for the layer's outputs, (conv_groups, samples, outputs per group).

        Args:
            clip: range of the values after clipping; differences outside of it do not count. None: no clipping.
        """
        value, wanted = self.value(), self.wanted
        if clip is not None:
            low, high = clip
            wanted = torch.where(wanted <= low, value.clamp(max=low), wanted)
            if high < float("inf"):
                wanted = torch.where(wanted >= high, value.clamp(min=high), wanted)
        error = (wanted - value) * torch.where(self.slope.abs() > _LEAST_SLOPE * self.slope.abs().max(), 1 / self.slope, 0.0)
        return error.view(len(error), len(self.weight), -1).transpose(0, 1)

    def solve(self, damping: float, clip: tuple[float, float] | None, clip_rounds: int) -> None:
        """Change weight and center by eq. (1), and solve it again for the clipped values.

        Args:
            damping: the smallest lambda, relative to the mean diagonal.
            clip: see `error`.
            clip_rounds: number of further solutions.
        """
        samples = self.inputs.shape[1]
        fitted = samples - samples // _HELD_OUT
        error = self._centered(self.error(None))
        first = _moments(self.inputs[:, :fitted], error[:, :fitted])
        rest = _moments(self.inputs[:, fitted:], error[:, fitted:])
        covariance, cross = ((a + b).double() / samples for a, b in zip(first, rest, strict=True))
        if not (covariance.isfinite().all() and cross.isfinite().all()):
            return
        self.covariance = covariance
        scale = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        dampings = [step * damping * scale for step in _DAMPING_STEPS]
        importance = self.slope.square().view(len(covariance), -1)
        gram, target = (sums / fitted for sums in first)  # float32 is enough for the choice of the damping
        held_out = [_held_out_error(_solution(gram, step.float())(target), *rest, importance) for step in dampings]
        best = int(np.argmin(held_out))
        if held_out[best] >= 0:  # no refit reduces the error on the held-out samples
            return
        solution = _solution(covariance, dampings[best])
        self.weight = self.weight + solution(cross)
        for _ in range(clip_rounds if clip is not None else 0):
            error = self._centered(self.error(clip))
            self.weight = self.weight + solution((self.inputs.transpose(1, 2) @ error).double() / samples)

    def move_center(self) -> None:
        """Compensate the mean error only."""
        self._centered(self.error(None))

    def _centered(self, error: Tensor) -> Tensor:
        """Return the error without its mean; the mean is added to the center."""
        if not self.has_intercept:
            return error
        mean = error.mean(1, keepdim=True)
        self.center = self.center + mean[:, 0]
        return error - mean

    def statistics(self, dense: LayerStatistics | None) -> LayerStatistics | None:
        """Return the dense network's statistics with the moments of the current inputs."""
        if dense is None or self.covariance is None:
            return None
        extended = F.pad(self.mean, (0, 1), value=1.0)
        moments = extended[:, :, None] * extended[:, None]
        moments[:, :-1, :-1] += self.covariance
        return replace(dense, kind=FULL, moments=moments.float().cpu().numpy(), count=self.inputs.shape[1])

    def shift(self, weight: Tensor) -> Tensor:
        """Return the shift of the layer's output, (outputs,), with which it equals `center` for the mean input.

        Args:
            weight: the layer's new weight, `outputs_first`.
        """
        return (self.center - self._product(weight.view(self.weight.shape).double()) - self.bias).flatten().float()


def _solution(covariance: Tensor, damping: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from E[u e^T], (conv_groups, n, outputs), to the change of the weight, (conv_groups, outputs, n)."""
    damped = covariance.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():  # rounding errors of float32 may exceed a small damping; the weight is then not changed
        return lambda cross: torch.zeros_like(cross).transpose(1, 2)
    return lambda cross: torch.cholesky_solve(cross, factor).transpose(1, 2)


def _held_out_error(change: Tensor, gram: Tensor, cross: Tensor, importance: Tensor) -> float:
    """Return the increase of the squared error that a change of the weight causes, for samples with these sums."""
    per_output = ((change @ gram) * change).sum(2) - 2 * (change * cross.transpose(1, 2)).sum(2)
    return float((importance * per_output).sum())


def _moments(inputs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of u u^T and u e^T, (conv_groups, n, n) and (conv_groups, n, outputs per group)."""
    return _gram(inputs), inputs.transpose(1, 2) @ error


def _gram(inputs: Tensor) -> Tensor:
    """Return inputs^T inputs of each conv group, (conv_groups, n, n); large matrices are computed in strips (symmetry)."""
    n = inputs.shape[2]
    if n < 4 * _STRIP:
        return inputs.transpose(1, 2) @ inputs
    gram = inputs.new_empty(len(inputs), n, n)
    for start in range(0, n, -(-n // 4)):
        strip = slice(start, start + -(-n // 4))
        gram[:, strip, start:] = inputs[:, :, strip].transpose(1, 2) @ inputs[:, :, start:]
        gram[:, start:, strip] = gram[:, strip, start:].transpose(1, 2)
    return gram
