"""Samplers of Optuna: tree-structured Parzen estimators, Gaussian processes, CMA-ES, NSGA-III.

Each budget has a study in memory, whose parameters are the actions of all choices, in [0, 1]. What a sampler proposes is scaled
to the budget (`ActionSpace.scale_to_budget`) and evaluated; the study is told the score with the parameters as proposed.

Sources: Akiba et al. 2019 (Optuna), arXiv:1907.10902. `tpe`: Bergstra et al. 2011 (NeurIPS 24), multivariate as in Falkner et
al. 2018 (BOHB), arXiv:1807.01774. `gp`: log expected improvement, Ament et al. 2023, arXiv:2310.20708. `cmaes`: Hansen 2016,
arXiv:1604.00772. `nsgaiii`: Deb & Jain 2014 (IEEE Trans. Evol. Comput. 18).

Where we differ and why:
1. No constraints are declared: limits of costs hold by construction. A limit of the metric's loss is the objective itself.
2. Proposals come in batches. A batch is told when all of it is back, in the order in which it was handed out: results depend on
   the seed and not on which worker is faster. Within a batch, `tpe` takes proposals that are out for bad ones (constant liar);
   the others treat them as unknown.
3. `nsgaiii` maximizes the whole reward, with the costs; its proposals are projected onto the budget only, so that the front
   spreads below the limit. The others maximize its first component.
4. Failed and early stopped evaluations are told as failed.
5. Nothing is enqueued: these agents know neither sensitivities nor the other budgets.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from secateur.agents.core import fully_scored
from secateur.agents.generations import GenerationSearcher
from secateur.agents.per_budget import PerBudget
from secateur.cost_models.core import Count, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial


@dataclass(frozen=True)
class OptunaConfig:
    """Options of Optuna's samplers.

    Attributes:
        sampler: tpe, gp, cmaes or nsgaiii.
        batch: proposals of a budget that are evaluated at the same time.
        startup: proposals of a budget that are random, before the model of `tpe` or `gp` is used.
        population: policies per generation of `cmaes` and `nsgaiii`.
    """

    sampler: Literal["tpe", "gp", "cmaes", "nsgaiii"] = "tpe"
    batch: Count = 4
    startup: Count = 10
    population: Count = 12

    def __post_init__(self) -> None:
        check_fields(self, "the agent `optuna`")


class OptunaSamplers(PerBudget):
    """One `StudySearch` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: OptunaConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {budget.name: StudySearch(config, space, budget, own) for budget, own in zip(budgets, own_rngs, strict=True)}
        )


class StudySearch(GenerationSearcher):
    """The study of one budget."""

    def __init__(self, config: OptunaConfig, space: ActionSpace, budget: Budget, rng: np.random.Generator):
        import optuna  # only this agent needs it here, and it takes a second

        super().__init__(space, budget)
        self.config = config
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._objectives = len(space.objectives) if config.sampler == "nsgaiii" else 1
        sampler = make_sampler(config, int(rng.integers(2**31)))
        self._study = optuna.create_study(directions=["maximize"] * self._objectives, sampler=sampler)
        self._distributions = {
            f"action{entry:04}": optuna.distributions.FloatDistribution(0.0, 1.0) for entry in range(int(space.used.sum()))
        }
        self._trials: list[Trial] = []

    def generation(self) -> list[np.ndarray]:
        """Return the next batch of proposals, scaled to the budget."""
        repair = self.space.execute if self.config.sampler == "nsgaiii" else self.space.scale_to_budget
        self._trials = [self._study.ask(self._distributions) for _ in range(self.config.batch)]  # type: ignore[arg-type]
        wanted = np.zeros((len(self._trials), *self.space.used.shape))
        wanted[:, self.space.used] = [[trial.params[name] for name in self._distributions] for trial in self._trials]
        return list(repair(wanted, self.budget))

    def select(self, episodes: Sequence[Episode]) -> None:
        """Tell the study the scores of a batch."""
        from optuna.trial import TrialState

        for trial, episode in zip(self._trials, episodes, strict=True):
            if fully_scored(episode) and episode.reward is not None:
                self._study.tell(trial, [float(value) for value in episode.reward[: self._objectives]])
            else:
                self._study.tell(trial, state=TrialState.FAIL)


def make_sampler(config: OptunaConfig, seed: int) -> BaseSampler:
    """Return the sampler of a configuration."""
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if config.sampler == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=config.startup, multivariate=True, constant_liar=True)
        if config.sampler == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=config.startup)
        if config.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, popsize=config.population, warn_independent_sampling=False)
        return samplers.NSGAIIISampler(seed=seed, population_size=max(config.population, 2))
