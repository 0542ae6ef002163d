"""Stores the sensitivities of a run's choices in its folder, so that a resumed run has the same numbers."""

from __future__ import annotations

import json
from os.path import exists, isfile
from pathlib import Path

import numpy as np

from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError, Sensitivities
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.policy_space import PolicySpace
from secateur.search.run.folder import read_json

SENSITIVITIES = "sensitivities.json"


def write_sensitivities(run: Path, space: FeasibleSpace) -> None:
    """Write {choice: divergence in nats at evenly spaced actions from 0 to 1}, unless not measured or already there."""
    path = run / SENSITIVITIES
    if space.sensitivities is not None and not exists(path):
        names = [decision.name for decision in space.policy_space.decisions]
        curves = dict(zip(names, space.sensitivities.curves.tolist(), strict=True))
        document = {"schema": 1, "seconds": space.sensitivities.seconds, "curves": curves}
        replace_file(path, json.dumps(document, indent=1) + "\n")


def read_sensitivities(run: Path, space: PolicySpace) -> Sensitivities | None:
    """Return what a run has measured; None if it has not.

    Raises:
        InputError: if the file is damaged.
    """
    path = run / SENSITIVITIES
    if not isfile(path):
        return None
    document = read_json(path, "a run")
    try:
        curves = np.array([document["curves"][decision.name] for decision in space.decisions], np.float32)
        if curves.ndim != 2 or curves.shape[1] < 2 or not np.isfinite(curves).all():
            raise ValueError("its curves are not lists of finite numbers")
        return Sensitivities(curves, float(document["seconds"]))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None
