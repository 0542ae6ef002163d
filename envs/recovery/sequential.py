"""Least squares in sequence: each layer is refitted on what it really reads, towards what the dense network has there.

One forward pass of the compressed network over the calibration images. Just before a layer runs, its weight W and its
intercept become those that bring its output next to the dense one; the pass goes on with them. With u' what the layer
reads at sampled positions (after pruning, refits and rounding of all earlier layers, its own input on its grid) and t
the dense network's value there,

    W' = W + E[e u'^T] (E[u' u'^T] + lambda I)^-1,    e = t - W u',    u', e centered,                              (1)

the minimiser of E|W' u' - t|^2 + lambda |W' - W|^2 with a free intercept. So the error that earlier layers made is
absorbed, not added up. A layer with weight bits is quantized at once, with the moments of u' for quantizers that round
with compensation, and the intercept takes up the mean error of rounding. Then

- sums: if the layer's output (or its batch norm's) goes into a sum only, whose other operand is known already, the target
  is the dense SUM less the compressed network's other operand: the error of a residual stream is absorbed as well;
- clipping: if only a ReLU or ReLU6 reads the target, an error that it hides is none. The squared error behind it is
  lowered by turns: with W' fixed, what is clipped in both networks gets the present value for its target; then eq. (1).

Source: He et al. 2017 (channel pruning), arXiv:1707.06168 (whole-model pruning: inputs of the compressed, targets of the
dense network; the same for residual branches); Zhang et al. 2015, arXiv:1505.06798 (the asymmetric reconstruction with
nonlinearity, solved by turns).

Where we differ and why:
1. All layers are refitted, not only readers of pruned channels: any layer can absorb what came before it.
2. Damping pulls to the present weights; the intercept is free. Of a few dampings, that one is taken which, solved on
   four fifths of the samples, has the least error on the last fifth; a weight that none improves there stays. So fewer
   samples than unknowns (a classifier reads one position per image) do no harm.
3. No penalty between target and auxiliary variable as in Zhang et al.: clipped entries that agree are let go at once.
4. The last operand of a sum to be computed absorbs (a convolution on a shortcut that runs after the branch, status).
5. One batch, because every layer needs the refitted inputs of all images. Its memory is bounded by `max_bytes`: networks
   with large activations get fewer images, but more positions of each, so that a layer has the same number of samples.

Left as they are: layers that run never or several times, layers of which calibration has no moments (transposed
convolutions, padding other than zeros, weights that something else uses too), layers whose first axis is not that of the
images. Of layers with more than `max_inputs` unknowns per output only the intercept is refitted. If the forward pass of a
candidate calls other functions than the dense network's, layers after the difference are left alone.
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

from secateur.cost_models.core import FLOAT_BITS, Count, Positive, Range, check_fields
from secateur.envs.calibration.core import FULL, NONE, LayerStatistics
from secateur.envs.calibration.patches import outputs_at, patches, sample_positions
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.recovery.common.forward_values import ForwardPlan, Target, ValueTap, counting, plan_forward

log = logging.getLogger(__name__)

_FLOAT_BYTES = 4
_IMAGES_PER_CHUNK = 64
"""Images that share sampled positions, and pass through the dense network together."""

_ROUNDING = 1e-5
"""Errors below this share of the largest value come from float32 arithmetic: the layer is left as it is."""

_FREE_UNKNOWNS = 100
"""Added to a layer's unknowns where samples are short, so that depthwise convolutions get some."""

_MAX_PATCH_BYTES = 256_000_000
"""Of what one layer reads at the sampled positions; bounds the samples."""

_DAMPING_STEPS = (1, 30, 1000)
"""Multiples of the least damping among which a part of the samples, unseen by the fit, decides."""

_UNSEEN = 5
"""One in so many samples."""

_STRIP = 64
"""Products of fewer columns are not worth splitting."""

_LEAST_SLOPE = 1e-3
"""Outputs that batch norm multiplies by less than this share of the largest factor are not refitted."""


@dataclass(frozen=True)
class SequentialConfig:
    """How the layers are refitted.

    Attributes:
        damping: the least lambda over the mean of the diagonal of E[u' u'^T].
        max_images: at most this many of the calibration images are used.
        samples: sampled positions per layer, over all images.
        clip_rounds: how often eq. (1) is solved again for what ReLU lets through; 0: never.
        max_inputs: largest number of unknowns per output that is solved for.
        max_bytes: of the activations of the pass, about; bounds the number of images.
        max_target_bytes: of the dense network's values, which are kept for all candidates; bounds the samples.
        seed: of the sampled positions.
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
    """Refits convolutions of any grouping and linear layers in one pass; see the top of this file."""

    config: SequentialConfig = SequentialConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        # New parameters must be ordinary ones, which training can go on with, whoever calls.
        with torch.inference_mode(False), torch.no_grad():
            targets = candidate.cache.get(("sequential", self.config), lambda: dense_targets(candidate, self.config))
            _Pass(candidate, targets, self.config).run()


@dataclass(frozen=True)
class DenseTargets:
    """What the refits aim at.

    Attributes:
        plan: where it was found.
        positions: {layer: sampled output positions of each chunk of images}.
        values: {layer: (samples, dense outputs) float32}, images in order.
        images: how many images were used.
    """

    plan: ForwardPlan
    positions: Mapping[str, tuple[Tensor, ...]]
    values: Mapping[str, Tensor]
    images: int


def dense_targets(candidate: CandidateNetwork, config: SequentialConfig) -> DenseTargets:
    """Return the dense network's values, from one pass over the images."""
    model, modules, hidden = candidate.dense_model, candidate.dense_layers, _computing(candidate, candidate.dense_layers)
    plan = plan_forward(model, _refittable(candidate), hidden, candidate.required_images[:1])
    images = candidate.required_images[: _images_at_once(candidate, config)]
    chunks = images.split(_IMAGES_PER_CHUNK)
    rng = np.random.default_rng(config.seed)
    positions = {
        name: tuple(sample_positions(_num_positions(modules[name], target), most, rng) for _ in chunks)
        for (name, target), most in zip(plan.targets.items(), _sample_sizes(modules, plan, len(images), config), strict=True)
    }
    readers = _by_value({name: target.value for name, target in plan.targets.items()})
    values: dict[str, list[Tensor]] = {name: [] for name in positions}
    for index, chunk in enumerate(chunks):

        def take(number: int, value: Tensor, index: int = index, images: int = len(chunk)) -> None:
            for name in readers.get(number, ()):
                if _goes_by_image(value, plan.targets[name].sample, images, check=index == 0):
                    values[name].append(outputs_at(modules[name], value, positions[name][index]).flatten(0, 1))

        tap = ValueTap(plan.functions, take)
        with counting(tap, hidden):
            model(chunk)
    complete = {name: torch.cat(parts) for name, parts in values.items() if len(parts) == len(chunks)}
    return DenseTargets(plan, {name: positions[name] for name in complete}, complete, len(images))


def _computing(candidate: CandidateNetwork, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules of the layers, which may have a pre-hook that rounds their input."""
    return {layer.name: modules[layer.name] for layer in candidate.graph.geometry.layers if layer.name in modules}


def _refittable(candidate: CandidateNetwork) -> dict[str, str | None]:
    """Return {layer: its batch norm or None} of the layers that can be refitted if they run once."""
    known = [name for name, layer in candidate.required_calibration.layers.items() if layer.kind != NONE]
    return {name: candidate.batch_norms.get(name) if candidate.norm(name) is not None else None for name in known}


def _images_at_once(candidate: CandidateNetwork, config: SequentialConfig) -> int:
    """Return how many images' activations fit; eager layers hold twice what the plan's buffers do, batch norms being apart."""
    geometry = candidate.graph.geometry
    elements = geometry.buffer_fixed + geometry.group_units @ geometry.buffer_per_unit
    peak = 2 * _FLOAT_BYTES * float((geometry.live @ elements).max(initial=1.0))
    return max(1, min(config.max_images, len(candidate.required_images), int(config.max_bytes / peak)))


def _num_positions(layer: nn.Module, target: Target) -> int:
    """Return how many positions (tokens) there are on the first axis of one image's value, each."""
    shape = target.sample.shape
    return int(np.prod(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]))


def _sample_sizes(modules: Mapping[str, Any], plan: ForwardPlan, images: int, config: SequentialConfig) -> list[int]:
    """Return how many positions of each layer are sampled per entry of the first axis.

    Where memory is short, layers with many unknowns keep the more: a share of samples per unknown, the same for all.
    """
    sizes = []
    for name, target in plan.targets.items():
        layer, entries = modules[name], images * len(target.sample)
        unknowns = layer.weight[0].numel()
        patch_bytes = _FLOAT_BYTES * unknowns * getattr(layer, "groups", 1)
        most = min(config.samples, entries * _num_positions(layer, target), _MAX_PATCH_BYTES / patch_bytes)
        sizes.append((entries, _FLOAT_BYTES * layer.weight.shape[0], most, unknowns + _FREE_UNKNOWNS))
    all_entries, target_bytes, largest, all_unknowns = np.array(sizes, dtype=float).reshape(-1, 4).T
    per_unknown = config.samples / _FREE_UNKNOWNS
    while target_bytes @ np.minimum(largest, per_unknown * all_unknowns) > config.max_target_bytes and per_unknown > 1e-3:
        per_unknown *= 0.9
    counts: list[int] = np.ceil(np.minimum(largest, per_unknown * all_unknowns) / all_entries).astype(int).tolist()
    return counts


def _by_value(numbers: Mapping[str, int | None]) -> dict[int, list[str]]:
    """Return {number: layers}."""
    layers: dict[int, list[str]] = {}
    for name, number in numbers.items():
        if number is not None:
            layers.setdefault(number, []).append(name)
    return layers


def _goes_by_image(value: Tensor, sample: Tensor, images: int, check: bool) -> bool:
    """Whether the first axis of a value runs through the images (and parts of them), one after the other."""
    if len(value) != images * len(sample) or value.shape[1:] != sample.shape[1:]:
        return False
    return not check or bool((value[: len(sample)] - sample).abs().max() <= 1e-2 * sample.abs().max())


class _Pass:
    """The forward pass of the compressed network in which every layer is refitted before it runs."""

    def __init__(self, candidate: CandidateNetwork, dense: DenseTargets, config: SequentialConfig) -> None:
        self.candidate, self.dense, self.config = candidate, dense, config
        self.targets = {name: dense.plan.targets[name] for name in dense.values}
        self.waiting = _by_value({name: target.other for name, target in self.targets.items()})
        self.others: dict[str, Tensor] = {}
        self.tap = ValueTap(dense.plan.functions, self.keep)

    def run(self) -> None:
        """Refit."""
        layers, images = self.candidate.layers, self.candidate.required_images[: self.dense.images]
        # After the pre-hooks that are there already, so the input is on its grid.
        hooks = [layers[name].register_forward_pre_hook(partial(self.refit, name)) for name in self.targets]
        try:
            with counting(self.tap, _computing(self.candidate, layers)):
                self.candidate.network(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.tap.agrees:
            log.warning("the compressed network's forward pass differs from the dense one's: some layers were not refitted")

    def keep(self, number: int, value: Tensor) -> None:
        """Keep what will be added to the outputs of layers that are yet to run."""
        for name in self.waiting.get(number, ()):
            parts = zip(self._chunks(name, value), self.dense.positions[name], strict=True)
            self.others[name] = torch.cat(
                [outputs_at(self.candidate.layers[name], part, positions).flatten(0, 1) for part, positions in parts]
            )

    def _chunks(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(_IMAGES_PER_CHUNK * len(self.targets[name].sample))

    def refit(self, name: str, layer: Any, inputs: tuple) -> None:
        """Give a layer, about to run on these inputs, its new weight and intercept."""
        target = self.targets[name]
        if not self.tap.agrees or (target.other is not None and name not in self.others):
            return
        candidate = self.candidate
        parts = zip(self._chunks(name, inputs[0]), self.dense.positions[name], strict=True)
        rows = torch.cat([patches(layer, part, positions).flatten(0, 1) for part, positions in parts])
        kept = torch.from_numpy(candidate.kept_axes(name).outputs)
        wanted, other = self.dense.values[name], self.others.pop(name, None)
        wanted = wanted if len(kept) == wanted.shape[1] else wanted.index_select(1, kept)
        fit = _LayerFit(layer, candidate.norm(name), rows, wanted, other, candidate.has_intercept(name))
        quantized = candidate.layer_bits.get(name, (FLOAT_BITS,))[0] < FLOAT_BITS
        if fit.is_exact() and not quantized:
            return
        statistics = None
        if fit.inputs.shape[2] <= self.config.max_inputs:
            fit.solve(self.config.damping, target.clip, self.config.clip_rounds)
            candidate.set_weight(name, fit.weight.float().reshape(layer.weight.shape))
            statistics = fit.statistics(candidate.required_calibration.layers.get(name))
        else:
            fit.move_center()
        if quantized:
            candidate.quantize(name, statistics)
        if fit.has_intercept:
            candidate.shift(name, fit.shift(layer.weight))
            if quantized:  # the mean error of rounding is made up for: a correction of biases finds nothing left
                candidate.float_weights[name] = layer.weight.detach()


class _LayerFit:
    """The regression of one layer: its weight (conv_groups, outputs per group, n), its inputs and what its value should be.

    Args:
        layer: as it is before.
        norm: the batch norm behind it, if any.
        rows: what it reads, (samples, conv_groups, n).
        wanted: the dense network's value, (samples, outputs).
        other: what is added to the layer's output before that value, likewise; None: nothing.
        has_intercept: whether there is an intercept.
    """

    def __init__(self, layer: Any, norm: Any, rows: Tensor, wanted: Tensor, other: Tensor | None, has_intercept: bool) -> None:
        self.norm, self.wanted, self.other, self.has_intercept = norm, wanted, other, has_intercept
        groups = rows.shape[1]
        self.weight = layer.weight.detach().view(groups, -1, rows.shape[2]).double()
        self.bias = torch.zeros(self.weight.shape[:2]) if layer.bias is None else layer.bias.view(groups, -1)
        inputs = rows.transpose(0, 1)  # (conv_groups, samples, n)
        mean = inputs.mean(1, keepdim=True) if has_intercept else torch.zeros(groups, 1, rows.shape[2])
        self.inputs, self.mean = inputs - mean, mean[:, 0].double()
        self.center = self._product(self.weight) + self.bias  # the output at the mean input
        self.slope = torch.ones(self.weight.shape[:2].numel())
        if norm is not None:
            self.slope = torch.rsqrt(norm.running_var + norm.eps) * (1.0 if norm.weight is None else norm.weight)
        self.covariance: Tensor | None = None

    def _product(self, weight: Tensor) -> Tensor:
        """Return what the mean input makes of a weight, (conv_groups, outputs per group)."""
        return (weight @ self.mean[:, :, None])[:, :, 0]

    def value(self) -> Tensor:
        """Return the value with the weight and the center as they are, (samples, outputs)."""
        outputs = torch.baddbmm(self.center.float()[:, None], self.inputs, self.weight.float().transpose(1, 2))
        value = outputs.transpose(0, 1).flatten(1)
        if (norm := self.norm) is not None:
            value = F.batch_norm(value, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return value if self.other is None else value + self.other

    def is_exact(self) -> bool:
        """Whether there is nothing to repair."""
        return bool((self.wanted - self.value()).abs().max() <= _ROUNDING * self.wanted.abs().max())

    def error(self, clip: tuple[float, float] | None) -> Tensor:
        """Return by how much the layer's outputs should be larger, (conv_groups, samples, outputs per group).

        Args:
            clip: what lies outside is not seen; None: everything is.
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
        """Move weight and center by eq. (1), and again for what is clipped.

        Args:
            damping: the least, over the mean diagonal.
            clip: see `error`; None: nothing is clipped.
            clip_rounds: how often it is solved again.
        """
        samples = self.inputs.shape[1]
        seen = samples - samples // _UNSEEN
        error = self._centered(self.error(None))
        first = _moments(self.inputs[:, :seen], error[:, :seen])
        rest = _moments(self.inputs[:, seen:], error[:, seen:])
        covariance, cross = ((a + b).double() / samples for a, b in zip(first, rest, strict=True))
        if not (covariance.isfinite().all() and cross.isfinite().all()):
            return
        self.covariance = covariance
        scale = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        dampings = [step * damping * scale for step in _DAMPING_STEPS]
        importance = self.slope.square().view(len(covariance), -1)
        gram, target = (sums / seen for sums in first)  # float32 is enough for a choice
        unseen = [_unseen_error(_solution(gram, step.float())(target), *rest, importance) for step in dampings]
        best = int(np.argmin(unseen))
        if unseen[best] >= 0:  # no refit is better than none where it has not looked
            return
        solution = _solution(covariance, dampings[best])
        self.weight = self.weight + solution(cross)
        for _ in range(clip_rounds if clip is not None else 0):
            error = self._centered(self.error(clip))
            self.weight = self.weight + solution((self.inputs.transpose(1, 2) @ error).double() / samples)

    def move_center(self) -> None:
        """Make up for the mean error alone."""
        self._centered(self.error(None))

    def _centered(self, error: Tensor) -> Tensor:
        """Return the error without its mean, which the center takes over."""
        if not self.has_intercept:
            return error
        mean = error.mean(1, keepdim=True)
        self.center = self.center + mean[:, 0]
        return error - mean

    def statistics(self, known: LayerStatistics | None) -> LayerStatistics | None:
        """Return the moments of the inputs, in place of those of the dense network."""
        if known is None or self.covariance is None:
            return None
        extended = F.pad(self.mean, (0, 1), value=1.0)
        moments = extended[:, :, None] * extended[:, None]
        moments[:, :-1, :-1] += self.covariance
        return replace(known, kind=FULL, moments=moments.float().numpy(), count=self.inputs.shape[1])

    def shift(self, weight: Tensor) -> Tensor:
        """Return what must be added to the layer's output so that it is `center` at the mean input, (outputs,)."""
        return (self.center - self._product(weight.detach().view(self.weight.shape).double()) - self.bias).flatten().float()


def _solution(covariance: Tensor, damping: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes of E[u e^T] the change of the weight, (conv_groups, n, outputs) -> (conv_groups, outputs, n)."""
    damped = covariance.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.any():  # float32 sums may be off by more than a small damping: no change
        return lambda cross: torch.zeros_like(cross).transpose(1, 2)
    return lambda cross: torch.cholesky_solve(cross, factor).transpose(1, 2)


def _unseen_error(change: Tensor, gram: Tensor, cross: Tensor, importance: Tensor) -> float:
    """Return how much larger a change of the weight makes the squared error of samples with these sums."""
    per_output = ((change @ gram) * change).sum(2) - 2 * (change * cross.transpose(1, 2)).sum(2)
    return float((importance * per_output).sum())


def _moments(inputs: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of u u^T and u e^T, (conv_groups, n, n) and (conv_groups, n, outputs per group)."""
    return _gram(inputs), inputs.transpose(1, 2) @ error


def _gram(inputs: Tensor) -> Tensor:
    """Return inputs^T inputs of each conv group, (conv_groups, n, n); large ones by strips, because it is symmetric."""
    n = inputs.shape[2]
    if n < 4 * _STRIP:
        return inputs.transpose(1, 2) @ inputs
    gram = inputs.new_empty(len(inputs), n, n)
    for start in range(0, n, -(-n // 4)):
        strip = slice(start, start + -(-n // 4))
        gram[:, strip, start:] = inputs[:, :, strip].transpose(1, 2) @ inputs[:, :, start:]
        gram[:, start:, strip] = gram[:, strip, start:].transpose(1, 2)
    return gram
