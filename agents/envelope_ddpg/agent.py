"""One-stage envelope DDPG: actor and critics take the preference and the budget as inputs, so one run serves all of them.

In the manner of MCMC (Li et al. 2024, doi 10.1109/TNNLS.2024.3353763, "one-stage envelope DDPG"), of which only the abstract is
public: its state, reward, networks and training cannot be reproduced, and this module does not claim to. Decisions:

1. *One stage*. Yang et al. 2019 (arXiv:1908.08342) learn over all preferences and then adapt to a hidden one. Here preference and
   budget are inputs that may change at any time, also afterwards (`propose`), so there is no second stage.
2. *Envelope target*: the maximum over preferences w' of completions by the target actor (Yang's optimality filter, the actor in
   place of the maximum over actions), the pessimistic critic inside it, mixed with the plain target (QENV_CTN, in the code of
   CAPQL); the whole vector of the critic with the smaller scalarized value (PD-MORL). See targets.py. A switch, off by default
   because it did not help (config.py): evaluated policies are chosen by the critics' values of complete sequences, which depend
   on no preference, so the maximum only reaches them through the actor's rollouts.
3. *Costs are never learned*. The critics predict the quality alone; costs of a completion come from the simulated environment
   (`ActionSpace.simulate`), and so does their slope by the action in the actor's gradient, as a finite difference.
4. *Completions are valued at their end*. The simulator reaches the last step anyway, and there the critics need no
   bootstrapping: a complete sequence alone decides the quality, and that of evaluated sequences is known.
5. *The sequence belongs to the state*: an observation alone does not contain the choices for earlier layers.
6. *Hindsight*: an episode can be practiced under other preferences (HPR-CAPQL) and under every budget that would have executed
   the same actions, because raw reward components are stored. Switches as well, off for the same reason. gamma is 1 and only the
   last step has a reward.
7. *Planned batches*: completions cost more than gradient steps, so targets are computed for a few transitions per episode and
   pooled; many small steps sample from the pool until the transitions are replaced (GPI-PD takes 20 steps per observation).
8. *Few noisy scores*: networks overfit 50 to 200 of them. So the critics' input actions get noise instead of dropout and layer
   norms alone (DroQ, GPI-PD), they learn log-odds, and their predictions are blended with an additive Gaussian process
   (additive.py), weighted by how well both predicted later episodes. That process uses the sensitivities of all choices
   (envs/sensitivity.py), which predict most of the score of random policies before any is evaluated.
9. *Choosing*: first rule-based policies (greedy by sensitivities, uniform, CLR-RNF), then random feasible policies, then the
   policies with the best predictions: half of the time among changes of the best evaluated policies (the moves of the bee colony,
   normal steps, steps of a whole kind and towards its mean), else among noisy rollouts of the actor (AMC's truncated normal),
   uniform and random policies. The best candidates are changed and compared again for a few rounds: an evolutionary search that
   needs no evaluation. All are scaled to the budget when lower costs have no weight.
10. *Exploration*: a share of the episodes evaluates the policy, under any budget and preference, that would add most hypervolume
    to the front if the critics are right (after GPI-LS, which visits the preference with the largest expected gain). Budgets
    reach concave parts of a front, which linear preferences cannot.
11. *Order*: episodes are learned from in the order in which they were asked for, and a choice builds on exactly those before the
    last `lookahead`: results depend on the seed and not on which worker is faster (episode_queue.py).

agents/amc_ddpg.py is AMC's plain DDPG, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from secateur.agents.clr_rnf import ClrRnf, ClrRnfConfig
from secateur.agents.core import SequenceActor, fully_scored, simplex
from secateur.agents.envelope_ddpg.candidates import Candidates
from secateur.agents.envelope_ddpg.config import OWNER, EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.learner import ENOUGH, Learner
from secateur.agents.envelope_ddpg.networks import one_thread
from secateur.agents.envelope_ddpg.replay import (
    Choice,
    Memory,
    executes_unchanged,
    meets,
    sample_preferences,
    tighter_budgets,
)
from secateur.agents.envelope_ddpg.storage import AgentState, damage_refused, read_state, space_facts, write_state
from secateur.agents.episode_queue import EpisodeQueue
from secateur.agents.greedy import Greedy, GreedyConfig, allocate
from secateur.agents.pareto import Archive, hypervolume
from secateur.agents.random_search import random_sequence
from secateur.agents.uniform import Uniform, UniformConfig
from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode

NOISE, NOISE_DECAY, LEAST_NOISE = 0.5, 0.95, 0.03
"""Standard deviation of the noise on actions: NOISE * NOISE_DECAY ** (episodes after the warm-up), at least LEAST_NOISE."""

PROPOSAL_NOISE = 0.1
"""The same when the agent proposes without evaluation."""


class EnvelopeDdpg:
    """Asks, tells and, at any time, proposes policies for any preference and budget; see the module."""

    def __init__(self, config: EnvelopeDdpgConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config, self.space, self.budgets, self.rng = config, space, tuple(budgets), rng
        self.preference = simplex(OWNER, config.preference, space.objectives)
        tighter = tighter_budgets(space, self.budgets, config.training_budgets, rng)
        self.learner = Learner(config, space, [*self.budgets, *tighter], self.preference, rng)
        self.candidates = Candidates(space, self.learner, config.unguided, rng)
        self.archive = Archive()
        """The Pareto set of the feasible episodes that were learned from, objectives = -reward."""
        self.queue: EpisodeQueue[Choice, Memory] = EpisodeQueue(config.lookahead)
        self._rules = self._rule_based()
        self._chosen: set[CompressionPolicy] = set()

    @property
    def learned(self) -> int:
        """Number of evaluations that it has learned from, failed ones included."""
        return self.queue.learned

    @property
    def training_budgets(self) -> list[Budget]:
        """The named budgets, then the tighter ones of each."""
        return self.learner.budgets

    def prefer(self, preference: Sequence[float]) -> None:
        """Change the main preference, (num_objectives,) weights >= 0, at any time: the next choices follow it."""
        self.preference = self.learner.preference = simplex(OWNER, preference, self.space.objectives)

    # ------------------------------------------------------------------------------------------------------- protocol

    def ask(self, count: int) -> list[SequenceActor]:
        """Return at most `count` actors; fewer while the evaluations that the next choice builds on are out."""
        actors: list[SequenceActor] = []
        with one_thread():
            while len(actors) < count:
                for memory in self.queue.due():
                    self._learn(memory)
                if not self.queue.ready:
                    break
                actors.append(self._next())
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Keep the episodes; they are learned from in the order in which they were asked for."""
        for actor, episode in results:
            assert isinstance(actor, SequenceActor)
            choice = self.queue.sent(actor.ticket)
            self.queue.put(actor.ticket, self._memory(episode, choice) if fully_scored(episode) else None)

    def finish(self) -> None:
        """Learn from all episodes that came back, and forget those that are out: for agents that only propose from now on."""
        with one_thread():
            for memory in self.queue.rest():
                self._learn(memory)

    # -------------------------------------------------------------------------------------------------------- learning

    def _learn(self, memory: Memory | None) -> None:
        """Learn from the next episode; None: it failed."""
        if memory is not None:
            self.learner.test(memory)
            self._remember(memory)
        if len(self.learner.memories) >= ENOUGH:
            if self.space.num_steps > 1:
                self.learner.plan(self.config.planned)
            self.learner.learn(self.config.updates)

    def _remember(self, memory: Memory) -> None:
        self.learner.add(memory)
        if memory.feasible:
            self.archive.add(self.space.decode(memory.sequence), -memory.reward)

    def _memory(self, episode: Episode, choice: Choice) -> Memory:
        """Return what there is to learn from a scored episode."""
        sequence = np.asarray(choice.sequence if episode.actions is None else episode.actions, np.float32)
        own = next(i for i, budget in enumerate(self.budgets) if budget.name == episode.budget)
        reward, practiced = np.asarray(episode.reward, float), [own]
        if self.config.relabel_budgets:
            others = [i for i in range(len(self.training_budgets)) if i != own]
            met = [i for i in others if meets(self.space, reward, self.training_budgets[i])]
            practiced += [i for i in met if executes_unchanged(self.space, sequence, self.training_budgets[i])]
        observations = episode.observations
        if observations is None:
            observations = self.space.simulate(lambda *at: sequence[None, at[2]], [self.budgets[own]]).observations[0]
        return Memory(sequence.astype(float), observations, reward, np.array(practiced), choice.preference, episode.feasible)

    # -------------------------------------------------------------------------------------------------------- choosing

    def _next(self) -> SequenceActor:
        """Return the actor of the next choice."""
        if self._rules:
            index, sequence = self._rules.pop(0)
            choice = Choice(index, self.preference, sequence)
        elif self.queue.asked < self.config.warmup or len(self.learner.memories) < ENOUGH:
            choice = self._random()
        else:
            choice = self._best()
        self._chosen.add(self.space.decode(choice.sequence))
        return SequenceActor(self.budgets[choice.budget], choice.sequence, self.queue.add(choice))

    def _rule_based(self) -> list[tuple[int, np.ndarray]]:
        """Return (budget, sequence) of the first greedy, uniform and CLR-RNF policies of every budget, each policy once."""
        found: dict[CompressionPolicy, tuple[int, np.ndarray]] = {}
        for index, budget in enumerate(self.budgets):
            problem = self.space, [budget], self.rng
            rules = [Uniform(UniformConfig(), *problem), ClrRnf(ClrRnfConfig(), *problem)]
            if self.learner.sensitivities is not None:
                rules.insert(0, Greedy(GreedyConfig(), *problem))
            for rule in rules:
                for actor in rule.ask(1):
                    found.setdefault(self.space.decode(actor.sequence), (index, actor.sequence))
        return list(found.values())[: self.config.warmup]

    def _turn(self) -> tuple[int, bool]:
        """Return the index of a training budget, and whether to explore."""
        if self.rng.random() < self.config.exploration_share:
            return int(self.rng.integers(len(self.training_budgets))), True
        return self.queue.asked % len(self.budgets), False

    def _random(self) -> Choice:
        """Return a random feasible sequence, scaled to a training budget."""
        index, _ = self._turn()
        for _ in range(20):
            sequence = self.space.scale_to_budget(random_sequence(self.space, self.rng), self.training_budgets[index])
            if self.space.decode(sequence) not in self._chosen:
                break
        return self._choice(index, self.preference, sequence)

    def _choice(self, index: int, preference: np.ndarray, sequence: np.ndarray) -> Choice:
        """Return a sequence that was made for a training budget as a choice under its named budget, which executes it."""
        tighter = index - len(self.budgets)
        named = index if tighter < 0 else tighter // self.config.training_budgets
        # Costs that are monotone leave the sequence as it is.
        return Choice(named, preference, self.space.execute(sequence, self.budgets[named]))

    def _best(self) -> Choice:
        """Return the policy with the best prediction among candidates that were not chosen before."""
        count, objectives = self.config.candidates, len(self.space.objectives)
        index, explore = self._turn()
        preferences, indices = np.tile(self.preference, (count, 1)), np.full(count, index)
        if explore:
            indices = self.rng.integers(len(self.training_budgets), size=count)
            drawn = self.rng.random(count) < 0.5
            preferences[drawn] = sample_preferences(self.rng, int(drawn.sum()), objectives)
        # Changes of good policies would nearly always have the best predictions, so both groups have turns of their own.
        local = self.config.local > 0 and self.rng.random() < self.config.local
        budgets = [self.training_budgets[i] for i in indices]
        sequences = self.candidates.make(preferences, budgets, self._noise(), changed=count if local else 0)
        self.rng.random()  # not used; without it runs that were recorded before could not be resumed

        def value(sequences: np.ndarray) -> np.ndarray:
            rewards = self._expected(sequences)
            return self._gains(rewards) if explore else rewards @ self.preference

        sequences, values, origin = self.candidates.refine(sequences, preferences, budgets, value, self.config.rounds)
        for i in np.argsort(-values, kind="stable"):
            if self.space.decode(sequences[i]) not in self._chosen:
                return self._choice(int(indices[origin[i]]), preferences[origin[i]], sequences[i])
        return self._random()

    def _noise(self) -> float:
        return max(LEAST_NOISE, NOISE * NOISE_DECAY ** max(self.queue.asked - self.config.warmup, 0))

    def _expected(self, sequences: np.ndarray) -> np.ndarray:
        """Return the expected rewards of executed sequences, (n, num_objectives): predicted quality, exact costs."""
        return np.column_stack([self.predict_quality(sequences), -self.space.cost_shares(sequences)])

    def _gains(self, rewards: np.ndarray) -> np.ndarray:
        """Return how much hypervolume each reward vector would add to the front, (n,), up to a constant."""
        reference = np.array([0.0] + [1.0] * (rewards.shape[1] - 1))
        front = self.archive.objectives.reshape(-1, rewards.shape[1])
        return np.array([hypervolume(np.vstack([front, -reward]), reference) for reward in rewards])

    # --------------------------------------------------------------------------------------------------------- queries

    def predict_quality(self, sequences: np.ndarray) -> np.ndarray:
        """Return the mean prediction of the critics for executed sequences, (n,)."""
        return self.learner.predictions(sequences).mean(axis=0)

    def propose(
        self, budget: Budget, preference: np.ndarray | None = None, count: int = 3, rollouts: int = 256
    ) -> list[np.ndarray]:
        """Return the executed sequences with the best predictions for any budget and preference, without any evaluation.

        Args:
            budget: satisfiable; its limits need not be any that the agent has seen.
            preference: (num_objectives,) on the simplex; None: the main one.
            count: how many, best first; fewer if there are not so many different ones.
            rollouts: candidates that are made for it.
        """
        wanted = self.preference if preference is None else np.asarray(preference, float)
        changed = round(self.config.local * rollouts) if self.learner.memories else 0
        sequences = self.candidates.make(np.tile(wanted, (rollouts, 1)), [budget] * rollouts, PROPOSAL_NOISE, changed)
        evaluated = [memory.sequence for memory in self.learner.memories if meets(self.space, memory.reward, budget)]
        evaluated = [self.space.execute(sequence, budget) for sequence in evaluated]
        if self.learner.sensitivities is not None:
            evaluated.append(allocate(self.space, self.learner.sensitivities, budget, GreedyConfig.powers[0]))
        sequences = np.concatenate([sequences, *(sequence[None] for sequence in evaluated)])
        rows = np.tile(wanted, (len(sequences), 1)), [budget] * len(sequences)
        sequences, values, _ = self.candidates.refine(
            sequences, *rows, lambda sequences: self._expected(sequences) @ wanted, self.config.rounds
        )
        chosen: dict[CompressionPolicy, np.ndarray] = {}
        for i in np.argsort(-values, kind="stable"):
            if len(chosen) == count:
                break
            chosen.setdefault(self.space.decode(sequences[i]), sequences[i])
        return list(chosen.values())

    # --------------------------------------------------------------------------------------------------------- storage

    def save(self, folder: Path) -> None:
        """Finish the agent, and write it to a new folder, free of pickles."""
        self.finish()
        write_state(folder, self.state())

    @classmethod
    def load(cls, folder: Path, space: ActionSpace) -> EnvelopeDdpg:
        """Return the agent in a folder; it proposes like the one that was saved, and may search on.

        Raises:
            InputError: if there is none, or it belongs to another space.
        """
        with damage_refused(folder):
            return cls.from_state(read_state(folder, space), space)

    def state(self) -> AgentState:
        """Return all that a finished agent has learned."""
        return AgentState(
            config=self.config,
            space=space_facts(self.space),
            preference=self.preference,
            budgets=self.budgets,
            training_budgets=tuple(self.training_budgets),
            learned=self.learned,
            memories=tuple(self.learner.memories),
            errors=np.reshape(self.learner.errors, (-1, 2)),
            sensitivities=self.learner.sensitivities,
            tensors=self.learner.tensors(),
            rng=self.rng.bit_generator.state,
        )

    @classmethod
    def from_state(cls, state: AgentState, space: ActionSpace) -> EnvelopeDdpg:
        """Return the agent that has learned this; the space must be the one of the state."""
        agent = cls(state.config, space, state.budgets, np.random.default_rng(0))
        agent.prefer(state.preference.tolist())
        agent.queue.asked = agent.queue.learned = state.learned
        agent.learner.budgets = list(state.training_budgets)
        agent.learner.sensitivities = state.sensitivities
        for memory in state.memories:
            agent._remember(memory)
            agent._chosen.add(space.decode(memory.sequence))
        agent.learner.errors = list(state.errors)
        agent.learner.load_tensors(state.tensors)
        agent._rules = []  # what they propose has been evaluated, or is among the candidates
        agent.rng.bit_generator.state = state.rng
        return agent
