"""`secateur benchmark score`: which score of the search ranks policies like the test score after the finalists' repair.

Policies of one budget are scored in every way that a search could score them, then repaired by the finalists' recovery and
scored on the test split, which nothing else has used. Random policies differ much; those around greedy's are what a search
compares at its end, so their rank correlation is given apart. A score that ranks well may still be exploited by an optimizer:
`secateur benchmark search` with `--set search.score=...` shows what optimizing it gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from secateur.envs.core import Budget, CompressionPolicy
from secateur.envs.recovery import RECOVERIES, Recovery
from secateur.envs.scores.metric import MetricScore, MetricScoreConfig
from secateur.search.benchmarks.policies import choose_budget, random_policies
from secateur.search.benchmarks.records import Records, Row, config_record
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_plugin, build_problem, make_evaluator, with_sensitivities
from secateur.search.config import LEAST_CHECKED, PluginEntry, SearchConfig
from secateur.search.correlation import spearman
from secateur.search.problem import Problem
from secateur.search.results.score_check import CHEAPER
from secateur.search.run.score_check import greedy_sequences, near_greedy

SETTINGS: Mapping[str, tuple[PluginEntry, ...]] = {
    "least_squares": (PluginEntry(name="least_squares"),),
    "least_squares + batch_norm": (
        PluginEntry(name="least_squares"),
        PluginEntry(name="batch_norm", options={"max_images": 256}),
    ),
    "sequential, 128 images": (PluginEntry(name="sequential", options=dict(CHEAPER["sequential"])),),
    "sequential": (PluginEntry(name="sequential"),),
}
"""{name in tables and rows: recoveries of the search}."""

SENSITIVITIES = "sum of sensitivities ** 0.75"
POWER = 0.75


def run_scores(config: SearchConfig, budget_name: str | None, policies: int, output: Path) -> None:
    """Measure and report; see `compare_scores`.

    Args:
        config: its `recovery` and `search.score` are not used.
        budget_name: may be None if the configuration has only one budget.
        policies: number of random ones, and of those around greedy's.
        output: folder of the results.
    """
    search = config.search.model_copy(update={"score": PluginEntry(name="divergence")})
    changed = config.model_copy(update={"search": search, "recovery": (PluginEntry(name="least_squares"),)})
    with show_progress() as progress:
        problem = build_problem(changed, progress.status)
        budget = choose_budget(problem, budget_name)
        records = Records(output / ROWS, {"benchmark": "score", "config": config_record(config), "budget": budget.name})
        problem = with_sensitivities(problem, progress.status)
        progress.stop()
        drawn = drawn_policies(problem, budget, policies)
        write_results(records, compare_scores(problem, drawn, records), partial(score_report, problem, budget))


def drawn_policies(problem: Problem, budget: Budget, count: int) -> list[tuple[str, CompressionPolicy]]:
    """Return (kind, policy) of distinct policies at the edge of the budget: `count` random, greedy's, `count` around these."""
    greedy = greedy_sequences(problem, budget)
    drawn = [("random", policy) for policy in random_policies(problem, budget, count)]
    drawn += [("greedy", problem.space.decode(sequence)) for sequence in greedy]
    drawn += [("near greedy", policy) for policy in near_greedy(problem, budget, greedy, count)]
    return list({policy: (kind, policy) for kind, policy in drawn}.values())


def compare_scores(problem: Problem, drawn: Sequence[tuple[str, CompressionPolicy]], records: Records) -> Iterator[str]:
    """Add a row for every policy that has none yet; yield each new row as a line of text.

    Args:
        problem: with sensitivities and the score `divergence`.
        drawn: (kind, policy) of every policy.
        records: the rows.
    """
    recoveries = {name: [build_plugin(RECOVERIES, entry) for entry in entries] for name, entries in SETTINGS.items()}
    for index, (kind, policy) in enumerate(drawn):
        if records.find(policy=index) is not None:
            continue
        network = problem.finalist_assembler.assemble(policy)
        test = problem.task.evaluate(network, "test").score
        quality, metric = problem.task.metric.quality(test, problem.dense.score), problem.task.metric
        scores = {name: _scores(problem, policy, own) for name, own in recoveries.items()}
        row = records.add(policy=index, kind=kind, test=test, quality=quality, sensitivities=_sum(problem, policy), scores=scores)
        yield f"policy {index} ({kind}): {metric.text(row['test'])} {metric.label} on test images after repair"


def _sum(problem: Problem, policy: CompressionPolicy) -> float:
    space, sensitivities = problem.space.policy_space, problem.space.sensitivities
    assert sensitivities is not None, "with_sensitivities comes first"
    sequence = space.levels_to_sequence(space.policy_to_levels(policy))
    return float((sensitivities(sequence[space.used]) ** POWER).sum())


def _scores(problem: Problem, policy: CompressionPolicy, recoveries: Sequence[Recovery]) -> dict[str, Any]:
    """Return quality and seconds of both scores under these recoveries; seconds include assembly and repair."""
    assembler = replace(problem.assembler, recoveries=recoveries)
    seconds, network = timed(make_evaluator(replace(problem, assembler=assembler)).network, policy)
    metric = MetricScore(MetricScoreConfig(), problem.task, problem.assembler.model, problem.dense.score)
    found = {}
    for name, score in (("metric", metric), ("divergence", problem.score)):
        own, measured = timed(score.measure, network)
        found[name] = {"quality": score.metric.quality(measured.score, score.dense), "seconds": seconds + own}
    return found


# ---------------------------------------------------------------------------------------------------------------- report


def score_table(rows: Sequence[Row], metric: str) -> str:
    """Return one line of Markdown per score: rank correlation with the test score over all policies, and over good ones.

    Args:
        rows: of the policies.
        metric: label of the task's metric.
    """
    good = [row for row in rows if row["kind"] != "random"]
    heads = ["score", f"all {len(rows)} policies", f"{len(good)} around greedy", "s per policy"]
    lines = [[SENSITIVITIES, *(_correlation(part, [-row["sensitivities"] for row in part]) for part in (rows, good)), "-"]]
    for setting in SETTINGS:
        for name, label in (("metric", f"{metric}, validation"), ("divergence", "divergence, calibration")):
            found = [[row["scores"][setting][name]["quality"] for row in part] for part in (rows, good)]
            seconds = float(np.median([row["scores"][setting][name]["seconds"] for row in rows]))
            correlations = [_correlation(part, scores) for part, scores in zip((rows, good), found, strict=True)]
            lines.append([f"{setting}: {label}", *correlations, f"{seconds:.2f}"])
    return markdown_table(heads, lines)


def _correlation(rows: Sequence[Row], scores: Sequence[float]) -> str:
    if len(rows) < LEAST_CHECKED:
        return "-"
    return f"{spearman(scores, [row['quality'] for row in rows]):.2f}"


def score_report(problem: Problem, budget: Budget, rows: Sequence[Row]) -> str:
    """Return the table with what it was measured on."""
    metric, tests = problem.task.metric, [row["test"] for row in rows]
    return (
        f"{score_table(rows, metric.label)}\n\n"
        f"Spearman's rank correlation with {metric.label} on {problem.task.samples('test')} test images after the finalists' "
        f"repair, {metric.text(min(tests))} to {metric.text(max(tests))}, at the edge of the budget `{budget.name}`. Validation: "
        f"{problem.dense.images} images with labels; calibration: images without labels that no recovery has seen. Seconds: "
        f"median of repair and score. {problem.task.source}\n"
    )
