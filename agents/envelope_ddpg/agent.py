"""One-stage envelope DDPG: an actor and critics that know the preference and the budget, so one run answers all of them.

In the manner of MCMC (Li et al. 2024, doi 10.1109/TNNLS.2024.3353763, "one-stage envelope DDPG"), of which only the abstract
is public: its state, reward, networks and training cannot be reproduced, and nothing here claims to. Decisions and their sources:

1. *One stage*. Yang et al. 2019 (arXiv:1908.08342) learn over all preferences and then adapt to a hidden one. Here preference and
   budget are inputs that may change at any time, also afterwards (`propose`): nothing is left to adapt.
2. *Envelope target*: the sup over preferences w' of completions by the target actor (Yang's optimality filter, the actor in place
   of the maximum over actions), the pessimistic critic inside it, mixed with the plain target (QENV_CTN, in the code of CAPQL);
   the whole vector of the critic with the smaller scalarised value (PD-MORL). See targets.py. A switch, off by default because
   it did not help (config.py): what is evaluated is chosen by what the critics say of complete sequences, which depends on no
   preference, so the sup only reaches it through the actor's rollouts.
3. *Costs are never learned*. The critics know top-1 alone; costs of a completion come from the simulated environment
   (`ActionSpace.simulate`), and so does their slope by the action in the actor's gradient, as a finite difference.
4. *Completions are valued at their end*. The simulator walks to the last step anyway, where critics need no bootstrapping: a
   complete sequence is all that decides top-1, and evaluated ones are known there. `ahead: next` bootstraps at the next step.
5. *The sequence belongs to the state*: an observation alone does not tell what was done to earlier layers.
6. *Hindsight*: an episode can be practiced under other preferences (HPR-CAPQL) and under every budget that would have executed
   the same actions, because raw components are stored. Switches as well, and off for the same reason. gamma is 1 and only the end
   is rewarded.
7. *Planned batches*: completions cost more than gradient steps, so targets are computed for a few transitions per episode and
   pooled; many small steps sample from the pool until it ages out (GPI-PD takes 20 steps per observation).
8. *Few noisy scores*: 50 to 200 are learned by heart. So critics see blurred actions instead of dropout and layer norms alone
   (DroQ, GPI-PD), learn log-odds, and are blended with an additive Gaussian process (additive.py) by how well both predicted
   what came next. That process knows the sensitivities of all choices (envs/sensitivity.py), which tell most of what random
   policies score before any was evaluated.
9. *Acting*: rules first (greedy by sensitivities, uniform, CLR-RNF), then random feasible policies, then whatever the critics
   like best: half of the time among moves of the best known policies (those of the bee colony, normal ones, shifts of a whole
   kind and steps to its mean), else among noisy rollouts of the actor (AMC's truncated normal), uniform and random policies. The
   best of them are moved on and screened again for a few rounds: an evolutionary search that costs no evaluation. All are bent
   to the edge of the budget when lower costs are worth nothing.
10. A share of the episodes looks *elsewhere*: at the policy, under any budget and preference, that would add most hypervolume to
    the front if the critics are right (after GPI-LS, which visits the preference with the largest expected gain). Budgets reach
    concave parts of a front, which linear preferences cannot.
11. Episodes are learned from in the order in which they were asked for, and a choice builds on exactly those before the last
    `lookahead`: results depend on the seed and not on which worker is faster.
12. `scalar` is AMC's agent for comparison (He et al. 2018): one critic, bootstrapped, one update per step, the wall alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from secateur.agents.clr_rnf import ClrRnf, ClrRnfConfig
from secateur.agents.core import SequenceActor, fully_scored
from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.learner import ENOUGH, Learner, one_thread
from secateur.agents.envelope_ddpg.replay import Memory, Outstanding, executes_alike, sample_preferences, tighter_budgets
from secateur.agents.envelope_ddpg.storage import read_agent, write_agent
from secateur.agents.greedy import Greedy, GreedyConfig, allocate
from secateur.agents.pareto import Archive, hypervolume
from secateur.agents.random_search import random_sequence
from secateur.agents.uniform import Uniform, UniformConfig, uniform_family
from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode, InputError


class EnvelopeDdpg:
    """Asks, tells and, at any time, proposes policies for any preference and budget; see the module."""

    def __init__(self, config: EnvelopeDdpgConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config = config = config.resolved(space.num_steps)
        self.space, self.budgets, self.rng = space, tuple(budgets), rng
        self.preference = self._simplex(np.eye(len(space.objectives))[0] if config.preference is None else config.preference)
        self.goals = [*self.budgets, *tighter_budgets(space, self.budgets, config.goals, rng)]
        self.parents = [*range(len(self.budgets)), *np.repeat(np.arange(len(self.budgets)), config.goals).tolist()]
        self.learner = Learner(config, space, self.goals, self.preference, rng)
        self.archive = Archive()
        """The Pareto set of the feasible episodes that were learned from, objectives = -reward."""
        self.asked = self.learned = 0
        self._family = np.stack(uniform_family(space, UniformConfig().exponents))
        self._rules = self._rule_based()
        self._out: dict[int, Outstanding] = {}
        self._to_repeat: list[int] = []  # tickets that a restored agent hands out once more
        self._told: dict[int, Memory | None] = {}  # None: there is nothing to learn from
        self._known: set[CompressionPolicy] = set()

    def prefer(self, preference: Sequence[float]) -> None:
        """Change the main preference, (num_objectives,) weights >= 0, at any time: the next choices follow it."""
        self.preference = self.learner.preference = self._simplex(preference)

    def _simplex(self, preference: Sequence[float]) -> np.ndarray:
        objectives, weights = self.space.objectives, np.asarray(preference, float)
        if weights.shape != (len(objectives),):
            raise InputError(
                f"`preference` of envelope DDPG must have one weight for each of {', '.join(objectives)}, but got {weights.size}."
            )
        if not (weights.min() >= 0 and 0 < weights.sum() < np.inf):
            raise InputError(f"`preference` of envelope DDPG must be weights >= 0, not all zero, but got {weights.tolist()}.")
        return weights / weights.sum()

    # ------------------------------------------------------------------------------------------------------- protocol

    def ask(self, count: int) -> list[Actor]:
        """Return at most `count` actors; fewer while the evaluations that the next choice builds on are out."""
        with one_thread():
            return self._ask(count)

    def _ask(self, count: int) -> list[Actor]:
        actors: list[Actor] = []
        while self._to_repeat and len(actors) < count:
            ticket = self._to_repeat.pop(0)
            actors.append(SequenceActor(self.budgets[self._out[ticket].budget], self._out[ticket].sequence, ticket))
        while len(actors) < count:
            # A choice builds on exactly the episodes before the last `lookahead`, however fast the workers are.
            wanted = self.asked - self.config.lookahead + 1
            while self.learned < wanted and self.learned in self._told:
                self._learn_next()
            if self.learned < wanted:
                break
            actors.append(self._next())
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Keep the episodes; they are learned from in the order in which they were asked for."""
        for actor, episode in results:
            if actor.ticket not in self._out or actor.ticket in self._told:
                raise ValueError(
                    f"Episodes must come back once, with the actor that `ask` gave out, but ticket {actor.ticket} is not "
                    "out. Was it told twice?"
                )
            self._told[actor.ticket] = self._memory(episode, self._out[actor.ticket]) if fully_scored(episode) else None
            if actor.ticket in self._to_repeat:
                self._to_repeat.remove(actor.ticket)

    def finish(self) -> None:
        """Give up what is out, and learn from all that was told: for agents that are only asked from now on."""
        with one_thread():
            for ticket in sorted(self._told):
                self.learned = ticket
                self._learn_next()
        self.learned = self.asked
        self._out, self._to_repeat = {}, []

    # -------------------------------------------------------------------------------------------------------- learning

    def _learn_next(self) -> None:
        """Learn from the next episode, in the order of the tickets."""
        memory = self._told.pop(self.learned)
        del self._out[self.learned]
        self.learned += 1
        if memory is not None:
            self.learner.add(memory)
            if memory.feasible:
                self.archive.add(self.space.decode(memory.sequence), -memory.reward)
        if len(self.learner.memories) >= ENOUGH:
            if self.space.num_steps > 1:
                self.learner.plan(self.config.planned)
            done = self.learned / self.config.homotopy_episodes
            self.learner.learn(self.config.updates, min(1.0, done) if self.config.homotopy else 0.0)

    def _memory(self, episode: Episode, sent: Outstanding) -> Memory:
        """Return what there is to learn from a scored episode."""
        sequence = np.asarray(sent.sequence if episode.actions is None else episode.actions, np.float32)
        own = next(i for i, budget in enumerate(self.budgets) if budget.name == episode.budget)
        reward, goals = np.asarray(episode.reward, float), [own]
        if self.config.relabel_budgets:
            held = [i for i, goal in enumerate(self.goals) if i != own and self._holds(goal, reward)]
            goals += [i for i in held if executes_alike(self.space, sequence, self.goals[i])]
        observations = episode.observations
        if observations is None:
            observations = self.space.simulate(lambda *at: sequence[None, at[2]], [self.budgets[own]]).observations[0]
        return Memory(sequence.astype(float), observations, reward, np.array(goals), sent.preference, episode.feasible)

    # -------------------------------------------------------------------------------------------------------- choosing

    def _next(self) -> SequenceActor:
        if self._rules:
            index, sequence = self._rules.pop(0)
            preference = self.preference
        elif self.asked < self.config.warmup or len(self.learner.memories) < ENOUGH:
            index, preference, sequence = self._random()
        else:
            index, preference, sequence = self._choose()
        actor = SequenceActor(self.budgets[index], sequence, self.asked)
        self._known.add(self.space.decode(sequence))
        self._out[self.asked] = Outstanding(index, preference, sequence)
        self.asked += 1
        return actor

    def _rule_based(self) -> list[tuple[int, np.ndarray]]:
        """Return (budget, sequence) of the first greedy, uniform and CLR-RNF policies of every budget, each policy once."""
        found: dict[CompressionPolicy, tuple[int, np.ndarray]] = {}
        for index, budget in enumerate(self.budgets):
            rules = [Uniform(UniformConfig(), *self._problem(budget)), ClrRnf(ClrRnfConfig(), *self._problem(budget))]
            if self.learner.sensitivities is not None:
                rules.insert(0, Greedy(GreedyConfig(), *self._problem(budget)))
            for rule in rules:
                for actor in rule.ask(self.config.rules):
                    found.setdefault(self.space.decode(actor.sequence), (index, actor.sequence))
        return list(found.values())[: self.config.warmup]

    def _problem(self, budget: Budget):
        return self.space, [budget], self.rng

    def _turn(self) -> tuple[int, int, bool]:
        """(index of the named budget, index of the goal, whether to look elsewhere)."""
        named = self.asked % len(self.budgets)
        if self.rng.random() < self.config.elsewhere:
            goal = int(self.rng.integers(len(self.goals)))
            return self.parents[goal], goal, True
        return named, named, False

    def _random(self) -> tuple[int, np.ndarray, np.ndarray]:
        """A random feasible sequence, bent to the edge of a budget."""
        named, goal, _ = self._turn()
        for _ in range(20):
            sequence = self.space.scale_to_budget(random_sequence(self.space, self.rng), self.goals[goal])
            if self.space.decode(sequence) not in self._known:
                break
        return named, self.preference, self._under(sequence, named)

    def _under(self, sequence: np.ndarray, named: int) -> np.ndarray:
        """The sequence as the named budget executes it; costs that are monotone leave it as it is."""
        return self.space.execute(sequence, self.budgets[named])

    def _choose(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Roll out, move what is known, screen, move the best of it on, and take the best that is new."""
        count, objectives = self.config.candidates, len(self.space.objectives)
        _, goal, elsewhere = self._turn()
        preferences, goals = np.tile(self.preference, (count, 1)), np.full(count, goal)
        if elsewhere:
            goals = self.rng.integers(len(self.goals), size=count)
            drawn = self.rng.random(count) < 0.5
            preferences[drawn] = sample_preferences(self.rng, int(drawn.sum()), objectives)
        # The neighborhood of what is good already would win against anything unknown: each has its turns.
        near = self.config.local > 0 and self.rng.random() < self.config.local
        sequences = self._candidates(preferences, self._budgets(goals), self._noise(), moved=count if near else 0)
        luck = self.rng.random()
        sequences, values, origin = self._refine(
            sequences, preferences, self._budgets(goals), lambda sequences: self._values(sequences, elsewhere, luck)
        )
        for i in np.argsort(-values, kind="stable"):
            if self.space.decode(sequences[i]) not in self._known:
                named = self.parents[goals[origin[i]]]
                return named, preferences[origin[i]], self._under(sequences[i], named)
        return self._random()

    def _refine(
        self,
        sequences: np.ndarray,
        preferences: np.ndarray,
        budgets: Sequence[Budget],
        value: Callable[[np.ndarray], np.ndarray],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Move the best candidates on for a few rounds; return all sequences, their values, and the candidate each comes from."""
        values, origin, count = value(sequences), np.arange(len(sequences)), max(1, len(sequences) // 2)
        for _ in range(self.config.rounds if len(sequences) > 1 else 0):
            best = np.argsort(-values, kind="stable")[:ELITE]
            starts = best[(len(best) * self.rng.random(count) ** 2).astype(int)]
            moved = self._moved(sequences[starts], sequences[self.rng.choice(best, count)], sequences[best[:1]])
            moved = self._repair(moved, preferences[origin[starts]], [budgets[i] for i in origin[starts]])
            sequences, values = np.concatenate([sequences, moved]), np.append(values, value(moved))
            origin = np.append(origin, origin[starts])
        return sequences, values, origin

    def _budgets(self, indices: np.ndarray) -> list[Budget]:
        return [self.goals[index] for index in indices]

    def _values(self, sequences: np.ndarray, elsewhere: bool, luck: float) -> np.ndarray:
        """Return what the critics think of executed sequences, (n,): utilities, or what they would add to the front."""
        rewards = self._expected(sequences, self.config.screening, luck)
        return self._gains(rewards) if elsewhere else rewards @ self.preference

    def propose(
        self, budget: Budget, preference: np.ndarray | None = None, count: int = 3, rollouts: int = 256
    ) -> list[np.ndarray]:
        """Return the best executed sequences that the agent knows of for any budget and preference, without any evaluation.

        Args:
            budget: satisfiable; its limits need not be any that the agent has seen.
            preference: (num_objectives,) on the simplex; None: the main one.
            count: how many, best first in the opinion of the critics; fewer if there are not so many different ones.
            rollouts: candidates that are made for it.
        """
        wanted = self.preference if preference is None else np.asarray(preference, float)
        preferences, budgets = np.tile(wanted, (rollouts, 1)), [budget] * rollouts
        moved = round(self.config.local * rollouts) if self.learner.memories else 0
        sequences = self._candidates(preferences, budgets, 0.1, moved)
        known = [memory.sequence for memory in self.learner.memories if self._holds(budget, memory.reward)]
        known = [self.space.execute(sequence, budget) for sequence in known]
        if self.learner.sensitivities is not None:
            known.append(allocate(self.space, self.learner.sensitivities, budget, GreedyConfig.powers[0]))
        if known:
            sequences = np.concatenate([sequences, np.stack(known)])
        rows = np.tile(wanted, (len(sequences), 1)), [budget] * len(sequences)
        sequences, values, _ = self._refine(sequences, *rows, lambda sequences: self._expected(sequences, "mean", 0.0) @ wanted)
        chosen: dict[CompressionPolicy, np.ndarray] = {}
        for i in np.argsort(-values, kind="stable"):
            if len(chosen) == count:
                break
            chosen.setdefault(self.space.decode(sequences[i]), sequences[i])
        return list(chosen.values())

    def _candidates(self, preferences: np.ndarray, budgets: Sequence[Budget], noise: float, moved: int) -> np.ndarray:
        """Return one executed sequence per preference and budget, (n, num_steps, action_dim): moves, blind ones, rollouts."""
        count = len(budgets)
        rolled = count - moved - round(self.config.blind * (count - moved))
        sequences = np.concatenate(
            [
                self._moves(preferences[:moved], budgets[:moved]),
                self._blind(count - moved - rolled),
                self._roll_out(preferences[count - rolled :], budgets[count - rolled :], noise),
            ]
        )
        return self._repair(sequences, preferences, budgets)

    def _blind(self, count: int) -> np.ndarray:
        """Return sequences that nobody has learned, (count, num_steps, action_dim): at most half uniform, the rest random."""
        sequences = np.empty((count, *self.space.used.shape))
        if count:
            alike = self._family[self.rng.permutation(len(self._family))[: count // 2]]
            sequences[: len(alike)] = alike
            for row in sequences[len(alike) :]:
                row[:] = random_sequence(self.space, self.rng)
        return sequences

    def _noise(self) -> float:
        config = self.config
        return max(config.least_noise, config.noise * config.noise_decay ** max(self.asked - config.warmup, 0))

    def _roll_out(self, preferences: np.ndarray, budgets: Sequence[Budget], noise: float) -> np.ndarray:
        """Return the actor's executed sequences with truncated normal noise, (n, num_steps, action_dim)."""

        def act(observations: np.ndarray, sequences: np.ndarray, step: int, rows: np.ndarray) -> np.ndarray:
            wanted = self.learner.actions(observations, sequences, step, preferences[rows])
            return truncated_normal(wanted, noise, self.rng)

        return self.space.simulate(act, budgets).sequences if len(budgets) else np.empty((0, *self.space.used.shape))

    def _moves(self, preferences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return moves of the best known sequences of each budget, (n, num_steps, action_dim): bee colony's and normal."""
        starts, partners, bests = np.empty((3, len(budgets), *self.space.used.shape))
        sequences, rewards = self._experience()
        held: dict[int, np.ndarray] = {}
        for i, budget in enumerate(budgets):
            if id(budget) not in held:
                fitting = np.flatnonzero([self._holds(budget, reward) for reward in rewards])
                held[id(budget)] = fitting if len(fitting) else np.arange(len(rewards))
            known = held[id(budget)]
            order = known[np.argsort(-(rewards[known] @ preferences[i]), kind="stable")][:ELITE]
            starts[i] = sequences[order[int(len(order) * self.rng.random() ** 2)]]
            partners[i], bests[i] = sequences[order[self.rng.integers(len(order))]], sequences[order[0]]
        return self._moved(starts, partners, bests)

    def _moved(self, starts: np.ndarray, partners: np.ndarray, bests: np.ndarray) -> np.ndarray:
        """Return sequences (n, num_steps, action_dim) moved with respect to partners and the best ones."""
        rng, (count, _, kinds) = self.rng, starts.shape
        size = self.space.used.sum()
        here = rng.random(starts.shape) < rng.integers(1, size + 1, size=(count, 1, 1)) / size
        guided = rng.uniform(-1, 1, starts.shape) * (starts - partners) + rng.uniform(0, 1.5, starts.shape) * (bests - starts)
        normal = rng.normal(size=starts.shape) * 10 ** rng.uniform(-2, -0.5, (count, 1, 1))
        common = rng.normal(size=(count, 1, kinds)) * 0.1 * (rng.random((count, 1, 1)) < 0.5)
        kind = rng.random((count, 1, 1))  # a third guided, a third normal, a third both
        change = np.where(kind < 2 / 3, guided, 0) + np.where(kind > 1 / 3, normal + common, 0)
        moved = starts + np.where(here, change, 0)
        # A quarter also goes some way to the mean of each kind: good policies have few extremes.
        means = starts.sum(axis=1, keepdims=True) / np.maximum(self.space.used.sum(axis=0), 1)
        moved += (means - starts) * rng.random((count, 1, 1)) * (rng.random((count, 1, 1)) < 0.25)
        if self.space.used.any(axis=0).sum() > 1:  # with one kind of choice the bend to the edge would undo it
            moved += rng.uniform(-SHIFT, SHIFT, (count, 1, kinds)) * (rng.random((count, 1, 1)) < 0.5)
        return np.where(self.space.used, np.clip(moved, 0, 1), 0.0)

    def _experience(self) -> tuple[np.ndarray, np.ndarray]:
        memories = self.learner.memories
        return np.stack([m.sequence for m in memories]), np.stack([m.reward for m in memories])

    def _holds(self, budget: Budget, reward: np.ndarray) -> bool:
        """Whether a policy with this reward meets the budget, as far as the budget limits objectives."""
        shares = dict(zip(self.space.objectives[1:], -reward[1:], strict=True))
        return all(shares.get(n, 0.0) * self.space.dense_costs[n] <= limit for n, limit in budget.limits.items())

    def _repair(self, sequences: np.ndarray, preferences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Bend to the edge where lower costs are worth nothing; otherwise the wall alone."""
        bend = self.config.edge & ~(preferences[:, 1:] > 0).any(axis=1)
        repaired = np.zeros(sequences.shape, np.float32)
        for rows, repair in ((np.flatnonzero(bend), self.space.scale_to_budget), (np.flatnonzero(~bend), self._walled)):
            if len(rows):
                repaired[rows] = repair(sequences[rows], [budgets[i] for i in rows])
        return repaired

    def _walled(self, sequences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return what the environment would execute, (n, num_steps, action_dim)."""
        return self.space.simulate(lambda observations, so_far, step, rows: sequences[rows, step], budgets).sequences

    def _expected(self, sequences: np.ndarray, screening: str, luck: float) -> np.ndarray:
        """Return the rewards of executed sequences, (n, num_objectives): exact costs, and one top-1 of all predictions."""
        predictions = self.learner.predictions(sequences)
        match screening:
            case "optimistic":
                top1 = predictions.mean(axis=0) + predictions.std(axis=0)
            case "pessimistic":
                top1 = predictions.mean(axis=0) - predictions.std(axis=0)
            case "bound":
                top1 = predictions.mean(axis=0) + 2 * luck * predictions.std(axis=0)
            case "thompson":
                top1 = predictions[int(luck * len(predictions))]
            case _:
                top1 = predictions.mean(axis=0)
        return np.column_stack([top1, -self.space.cost_shares(sequences)])

    def _gains(self, rewards: np.ndarray) -> np.ndarray:
        """Return how much hypervolume each reward vector would add to the front, (n,)."""
        reference = np.array([0.0] + [1.0] * (rewards.shape[1] - 1))
        front = self.archive.objectives.reshape(-1, rewards.shape[1])
        return np.array([hypervolume(np.vstack([front, -reward]), reference) for reward in rewards])

    # --------------------------------------------------------------------------------------------------------- storage

    def save(self, folder: Path) -> None:
        """Write everything to a new folder, free of pickles; what is loaded from there goes on alike."""
        write_agent(folder, self)

    @classmethod
    def load(cls, folder: Path, space: ActionSpace) -> EnvelopeDdpg:
        """Return the agent in a folder as it was; `ask` hands out once more what was out. For `propose`, `finish` it first.

        Raises:
            InputError: if there is none, or it belongs to another space.
        """
        return read_agent(folder, space, cls)


ELITE = 10
"""How many of the best known policies of a budget, or of the candidates, are moved."""

SHIFT = 0.3
"""Largest step of all entries of a kind together, in half of the moves; a level or two of bit-widths."""


def truncated_normal(mean: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Return normal draws around `mean` that fall into [0, 1]; where ten tries do not, the last one is clipped."""
    drawn = mean + spread * rng.normal(size=mean.shape)
    for _ in range(10):
        outside = (drawn < 0) | (drawn > 1)
        if not outside.any():
            break
        drawn = np.where(outside, mean + spread * rng.normal(size=mean.shape), drawn)
    return np.clip(drawn, 0, 1)
