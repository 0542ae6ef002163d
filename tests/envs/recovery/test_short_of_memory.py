"""A repair that runs out of memory starts anew with smaller batches, and a candidate does not fail for it."""

from dataclasses import replace

import pytest
import torch

from secateur.envs import memory
from secateur.envs.recovery.sequential import Sequential
from tests.envs.recovery.sequential_cases import INNER, error, policy, problem


class Greedy:
    """Needs more memory than there is until the batches are divided by four."""

    after_quantization = False

    def __init__(self):
        self.tried = []

    def apply(self, candidate):
        self.tried.append(candidate.parts)
        candidate.set_weight("a1", torch.zeros_like(candidate.layers["a1"].weight) if candidate.parts < 4 else weight(candidate))
        if candidate.parts < 4:
            raise torch.OutOfMemoryError


def weight(candidate):
    return candidate.layers["a1"].weight.detach()


def test_a_repair_starts_anew_with_smaller_batches(residual, monkeypatch):
    monkeypatch.setattr(memory, "_parts", {})
    model, images, test = residual
    greedy, seen = Greedy(), []
    assembler = problem(model, images, [greedy, Sequential()])
    model_hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        found = assembler.assemble(policy(assembler, names=INNER))
        divided = set(seen)
        seen.clear()
        whole = replace(assembler, recoveries=[Sequential()])
        monkeypatch.setattr(memory, "_parts", {})
        wanted = whole.assemble(policy(assembler, names=INNER))
    finally:
        model_hook.remove()
    assert greedy.tried == [1, 2, 4]
    # Hooks are copied with the network, which runs once on all images.
    assert max(divided) == 24 and max(seen) == len(images) == 96
    # Few images repair less well, but the network is repaired, and nothing of the failed attempts is left in it.
    assert error(found, model, test) < 4 * error(wanted, model, test) < 1
    assert memory.memory_note() == ""
    with pytest.raises(torch.OutOfMemoryError):
        replace(assembler, recoveries=[Endless()]).assemble(policy(assembler))


class Endless:
    after_quantization = False

    def apply(self, candidate):
        raise torch.OutOfMemoryError
