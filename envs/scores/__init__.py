"""Scores: what a search maximizes. To add one, write one file and one line here."""

from secateur.envs.scores.core import Score, ScoreConfig
from secateur.envs.scores.divergence import DivergenceScore, DivergenceScoreConfig
from secateur.envs.scores.metric import MetricScore, MetricScoreConfig

SCORES: dict[str, tuple[type, type]] = {
    "metric": (MetricScoreConfig, MetricScore),
    "divergence": (DivergenceScoreConfig, DivergenceScore),
}

__all__ = ["SCORES", "Score", "ScoreConfig"]
