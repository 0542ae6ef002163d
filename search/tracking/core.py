"""What every tracker is: an object with a method for each event of a search.

    on_search_start ─▶ on_evaluation, on_front_change, ... ─▶ on_finalist, ... ─▶ on_epoch, ... ─▶ on_end

Several trackers follow a search at once. An error in one of them is reported once, and this tracker is not called again; the
search and the other trackers go on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.envs.core import Budget, Episode
from secateur.envs.metric import Metric
from secateur.envs.training.distillation import EpochRecord
from secateur.search.results.core import Finalist
from secateur.search.results.front import Front

Note = Callable[[str], None]
"""Called with a sentence that the user should read."""


@dataclass(frozen=True)
class SearchStart:
    """What is known when a search starts, or goes on.

    Attributes:
        run: its folder.
        config: the resolved configuration, as JSON values.
        budgets: of the search, with absolute limits.
        metric: of the search's score.
        evaluations: number of evaluations that the search will have at its end.
        done: number of evaluations that the run has already.
    """

    run: Path
    config: Mapping[str, Any]
    budgets: Sequence[Budget]
    metric: Metric
    evaluations: int
    done: int = 0


class Tracker:
    """Follows a search. Subclasses override the methods that they need; the others do nothing.

    All calls come from the process that started the search, in the order of the events.
    """

    def on_search_start(self, start: SearchStart) -> None:
        """Called first, also when a run is continued or its winners are trained later."""

    def on_evaluation(self, number: int, episode: Episode) -> None:
        """Called after every new evaluation; `number` counts from 0, as in the study."""

    def on_front_change(self, front: Front) -> None:
        """Called when an evaluation has changed the front of any budget."""

    def on_finalist(self, finalist: Finalist) -> None:
        """Called for every policy that was scored on the test split."""

    def on_epoch(self, evaluation: int, epoch: EpochRecord) -> None:
        """Called after every epoch of the training of a winner, which is the policy of that evaluation."""

    def on_end(self, error: BaseException | None) -> None:
        """Called last; `error` is what has ended the search early, None: nothing has."""


class ScalarTracker(Tracker, ABC):
    """A tracker that only needs named numbers: each event is turned into some, with a step."""

    @abstractmethod
    def open(self, start: SearchStart) -> None:
        """Connect, or open a file."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the values; `step` is the number of an evaluation, or of an epoch."""

    @abstractmethod
    def close(self, error: BaseException | None) -> None:
        """Finish; called only after `open`."""

    _step = 0
    _opened = False

    def on_search_start(self, start: SearchStart) -> None:
        """Open."""
        self._step = max(start.done - 1, 0)
        self.open(start)
        self._opened = True

    def on_evaluation(self, number: int, episode: Episode) -> None:
        """Log score, costs and seconds, and whether the policy fits its budget."""
        self._step = number
        values = {"evaluation/feasible": float(episode.feasible)}
        if episode.evaluation is not None:
            values |= {"evaluation/score": episode.evaluation.score, "evaluation/seconds": episode.evaluation.seconds}
            values |= {f"evaluation/cost/{name}": cost for name, cost in episode.evaluation.costs.items()}
        self.log(values, number)

    def on_front_change(self, front: Front) -> None:
        """Log the best score of each budget and the hypervolume."""
        values = {"hypervolume": front.hypervolume}
        for budget in front.budgets:
            if (best := front.best_score(budget.name)) is not None:
                values[f"best/{budget.name}"] = best
        self.log(values, self._step)

    def on_finalist(self, finalist: Finalist) -> None:
        """Log validation and test score."""
        scores = {"validation": finalist.validation.score, "test": finalist.final.score}
        self.log({f"finalist/{finalist.budget}/{split}": score for split, score in scores.items()}, self._step)

    def on_epoch(self, evaluation: int, epoch: EpochRecord) -> None:
        """Log loss, validation score and learning rate."""
        values = {"loss": epoch.loss, "learning_rate": epoch.learning_rate}
        if epoch.score is not None:
            values["validation"] = epoch.score
        self.log({f"training/{evaluation}/{key}": value for key, value in values.items()}, epoch.epoch)

    def on_end(self, error: BaseException | None) -> None:
        """Close."""
        if self._opened:
            self.close(error)


class Trackers(Tracker):
    """Calls several trackers; none of them can end a search.

    Args:
        trackers: each with its name.
        note: gets a sentence when a tracker fails.
    """

    def __init__(self, trackers: Iterable[tuple[str, Tracker]], note: Note):
        self._trackers, self._note = list(trackers), note

    @contextmanager
    def following(self, start: SearchStart) -> Iterator[None]:
        """Begin before the block, and end after it, whatever ends it."""
        self.on_search_start(start)
        try:
            yield
        except BaseException as error:
            self.on_end(error)
            raise
        self.on_end(None)

    def on_search_start(self, start: SearchStart) -> None:
        """See `Tracker`."""
        self._call("on_search_start", start)

    def on_evaluation(self, number: int, episode: Episode) -> None:
        """See `Tracker`."""
        self._call("on_evaluation", number, episode)

    def on_front_change(self, front: Front) -> None:
        """See `Tracker`."""
        self._call("on_front_change", front)

    def on_finalist(self, finalist: Finalist) -> None:
        """See `Tracker`."""
        self._call("on_finalist", finalist)

    def on_epoch(self, evaluation: int, epoch: EpochRecord) -> None:
        """See `Tracker`."""
        self._call("on_epoch", evaluation, epoch)

    def on_end(self, error: BaseException | None) -> None:
        """See `Tracker`."""
        self._call("on_end", error)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except (Exception, SystemExit) as error:
                self._trackers.remove((name, tracker))
                self._note(f"The tracker `{name}` failed in {method} and is not called again: {type(error).__name__}: {error}")
