"""What is done when a device runs out of memory: batches are halved until they fit, and the run says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.envs.inputs import ImageList, Inputs, call_model

log = logging.getLogger(__name__)

T = TypeVar("T")

EVALUATION, REPAIR, CALIBRATION, IMPORTANCE, TRAINING = "evaluation", "repair", "calibration", "importance", "training"
"""What has batches."""

MOST_PARTS = 1024

_parts: dict[str, int] = {}
"""{what: number of parts that its batches are divided into}, of this process: what did not fit once is not tried again."""


def halving(what: str, run: Callable[[int], T], most: int = MOST_PARTS) -> T:
    """Return the result of `run` with batches that fit into the memory.

    Args:
        what: has the batches; see the constants.
        run: takes the number of parts that each batch is divided into, 1 as long as memory suffices. It is called again after it
            ran out of memory, so it must not change anything before its end.
        most: largest number of parts.
    Raises:
        torch.OutOfMemoryError: if the smallest parts do not fit.
    """
    while True:
        parts = min(_parts.get(what, 1), most)
        try:
            return run(parts)
        except torch.OutOfMemoryError:
            if parts >= most:
                raise
        # After the error is dropped, because its frames keep the tensors of the failed attempt alive.
        _parts[what] = 2 * parts
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        log.warning("The device's memory is full: batches of the %s are divided into %d parts.", what, 2 * parts)


def memory_note() -> str:
    """Return which batches of this process are divided, in one sentence; "" if none are."""
    divided = [f"{what} by {parts}" for what, parts in _parts.items()]
    return f"The device's memory is full, so batch sizes are divided: {', '.join(divided)}." if divided else ""


def run_model(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return the outputs of a model in eval mode for a batch of inputs, computed in parts if memory is short."""

    def run(parts: int) -> Any:
        if parts == 1:
            return call_model(model, inputs)
        pieces = inputs.split(-(-len(inputs) // parts))
        return join_outputs([call_model(model, piece) for piece in pieces], isinstance(inputs, ImageList))

    return halving(EVALUATION, run, max(len(inputs), 1))


def join_outputs(outputs: Sequence[Any], one_by_one: bool = False) -> Any:
    """Return the outputs for consecutive samples as those for all of them.

    Args:
        outputs: trees of tensors (samples, ...).
        one_by_one: the outputs are lists with an entry per sample, as detectors give them.
    """
    if one_by_one:
        return list(chain.from_iterable(outputs))
    leaves, (structure, *_) = zip(*map(pytree.tree_flatten, outputs), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, structure)
