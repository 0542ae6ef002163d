"""Which policies of a run are exported, and where to: a budget's winner, one trial of the study, or the whole front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.policy_space import PolicySpace, policy_to_document
from secateur.search.results.document import winner
from secateur.search.run.journal import read_journal


@dataclass(frozen=True)
class Chosen:
    """One export to write.

    Attributes:
        folder: where to.
        budget: name of the budget that it is for.
        point: the policy, as front.json lists points.
    """

    folder: Path
    budget: str
    point: Mapping[str, Any]


def check_selection(budget: str | None, trial: int | None, front: bool) -> None:
    """Raise InputError unless exactly one of the three is given."""
    if (budget is not None) + (trial is not None) + front != 1:
        raise InputError(
            "Say what to export with exactly one of budget=NAME, trial=NUMBER and front=True.",
            "Say what to export with exactly one of --budget NAME, --trial NUMBER and --front.",
        )


def chosen_winner(run: Path, document: Mapping[str, Any], budget: str, output: Path | None = None) -> Chosen:
    """Return a budget's winner; its folder is RUN/exports/BUDGET unless `output` names another.

    Args:
        run: the run's folder.
        document: its front.json.
    Raises:
        InputError: if there is no such budget, or no policy fits it.
    """
    return Chosen(output or run / "exports" / budget, budget, winner(document, budget))


def chosen_front(run: Path, document: Mapping[str, Any], output: Path | None = None) -> list[Chosen]:
    """Return the front of all budgets together, each policy for the first budget that it fits.

    Their folders are RUN/exports/front/NUMBER unless `output` names another parent; the rest as in `chosen_winner`.
    """
    if not document["front"]:
        raise InputError(f"Nothing in {document['evaluations']} evaluations fits any budget. Search longer, or allow more.")
    points = {point["evaluation"]: point for point in document["points"]}
    parent = output or run / "exports" / "front"
    return [Chosen(parent / str(number), points[number]["fits"][0], points[number]) for number in document["front"]]


def find_trial(run: Path, number: int) -> Any:
    """Return the Optuna trial with this number; it has a policy.

    Raises:
        InputError: if there is no such trial, or it failed.
    """
    trials = read_journal(run).trials
    if not 0 <= number < len(trials):
        reach = f"its trials are 0 to {len(trials) - 1}" if trials else "it has none"
        raise InputError(f"There is no trial {number} in {run}; {reach}.")
    trial = trials[number]
    if not trial.params:
        raise InputError(
            f"Trial {number} has nothing to export: {trial.user_attrs.get('failure', 'it has no policy')}. Choose another."
        )
    return trial


def chosen_trial(run: Path, trial: Any, space: PolicySpace, output: Path | None = None) -> Chosen:
    """Return a trial's policy, whether it fits a budget or not, for the budget that it was made for.

    Args:
        trial: of `find_trial`.
        space: of the run's configuration.
        run, output: as in `chosen_winner`; by default the folder is `trial_folder`.
    Raises:
        InputError: if the run was made with another space.
    """
    point = {
        "evaluation": trial.user_attrs["evaluation"],
        "policy": policy_to_document(policy_of_trial(trial, space)),
        "costs": {name.removeprefix("cost/"): value for name, value in trial.user_attrs.items() if name.startswith("cost/")},
    }
    return Chosen(output or trial_folder(run, trial.number), trial.user_attrs["budget"], point)


def policy_of_trial(trial: Any, space: PolicySpace) -> CompressionPolicy:
    """Return what a trial chose.

    Raises:
        InputError: if the run was made with another space.
    """
    try:
        return space.choices_to_policy(trial.params)
    except ValueError:
        raise InputError(
            f"Trial {trial.number} was made with another model or space than the run's manifest names. "
            "Restore the model's code, or search again."
        ) from None


def trial_folder(run: Path, number: int) -> Path:
    """Return the default folder of a trial's export."""
    return run / "exports" / f"trial-{number}"
