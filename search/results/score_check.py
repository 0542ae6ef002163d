"""What a check of the search's score found: its rank correlation, in sentences, and dearer settings if it is low."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.search.config import LEAST_CHECKED, PluginEntry, SearchConfig
from secateur.search.correlation import spearman, spearman_interval
from secateur.search.documents import ManifestDocument, check_document
from secateur.search.run.folder import MANIFEST, load_manifest

LEAST_CORRELATION = 0.6
"""Below this rank correlation with the quality after the finalists' recovery, a dearer setting is recommended."""

CHEAPER: Mapping[str, Mapping[str, int]] = {"sequential": {"max_images": 128, "samples": 4000}}
"""{recovery of finalists: options with which it is cheap enough for every candidate}."""


@dataclass(frozen=True)
class ScoreCheck:
    """How well the search's score ranks good policies.

    Attributes:
        policies: number of policies that could be scored.
        budget: name of their budget.
        correlation: Spearman's, of the search's score with the quality after the finalists' recovery; None: there are too few
            policies, or all of them have the same score.
        interval: its 95 % confidence interval; None likewise.
        seconds: that the check took, without the sensitivities.
    """

    policies: int
    budget: str
    correlation: float | None
    interval: tuple[float, float] | None
    seconds: float

    @property
    def low(self) -> bool:
        """Whether a dearer setting is recommended."""
        if self.correlation is None:
            return self.policies >= LEAST_CHECKED
        return self.correlation < LEAST_CORRELATION

    def line(self) -> str:
        """Return the result in one line."""
        if self.policies < LEAST_CHECKED:
            needed = f"{LEAST_CHECKED} different policies near greedy's are needed for `{self.budget}`"
            return f"the search's score is not checked: {needed}, but {self.policies} can be scored"
        if self.correlation is None or self.interval is None:
            return f"the search's score cannot rank {self.policies} good policies: all of them have the same score"
        low, high = self.interval
        return f"the search's score ranks {self.policies} good policies with {self.correlation:.2f} ({low:.2f} to {high:.2f})"

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return asdict(self)


def compare_ranks(scores: Sequence[float], careful: Sequence[float], budget: str, seconds: float) -> ScoreCheck:
    """Return the check of some policies of one budget.

    Args:
        scores: quality of each policy under the search's score and recovery.
        careful: the same after the finalists' recovery.
        budget: its name.
        seconds: that both took.
    """
    found = spearman(scores, careful) if len(scores) >= LEAST_CHECKED else math.nan
    if math.isnan(found):
        return ScoreCheck(len(scores), budget, None, None, seconds)
    return ScoreCheck(len(scores), budget, found, spearman_interval(found, len(scores)), seconds)


def recorded_check(manifest: Mapping[str, Any]) -> ScoreCheck | None:
    """Return the check that a manifest holds, if there is one; the manifest has passed `ManifestDocument`."""
    found = manifest.get("score_check")
    if found is None:
        return None
    interval = found["interval"] and (found["interval"][0], found["interval"][1])
    return ScoreCheck(found["policies"], found["budget"], found["correlation"], interval, found["seconds"])


def check_lines(run: Path) -> list[str]:
    """Return what the check of a run's score found, with what to change; [] if there was none.

    Raises:
        InputError: if the manifest is damaged.
    """
    config, manifest = load_manifest(run)
    check_document(manifest, ManifestDocument, run / MANIFEST)
    check = recorded_check(manifest)
    return [] if check is None else score_lines(check, config)


def score_lines(check: ScoreCheck, config: SearchConfig) -> list[str]:
    """Return the result of a check, and what to write into the configuration if the correlation is low."""
    return [check.line(), *(recommendation(config) if check.low else [])]


# --------------------------------------------------------------------------------------------------------- dearer settings


def recommendation(config: SearchConfig) -> list[str]:
    """Return a sentence that recommends a dearer setting, and the lines of the configuration that choose it."""
    poor = f"Below {LEAST_CORRELATION}, the search hardly tells good policies apart."
    changes = dearer_settings(config)
    if not changes:
        more = "`data.calibration`" if config.search.score.name == "divergence" else "`data.validation`"
        return [f"{poor} Candidates are repaired like finalists already, so only more samples help: raise {more}."]
    return [f"{poor} A dearer setting can rank them better; write in the configuration:", *_yaml_lines(changes)]


def dearer_settings(config: SearchConfig) -> dict[str, Any]:
    """Return sections of the configuration with the next dearer setting; {} if there is none.

    The recovery becomes that of the finalists, first with fewer images. The score `divergence` uses all outputs, so it needs
    fewer samples than a metric.
    """
    changes: dict[str, Any] = {}
    quick, careful = config.recovery, config.finalize.recovery or config.recovery
    if [entry.name for entry in quick] != [entry.name for entry in careful]:
        changes["recovery"] = [_entry(_cheaper(entry)) for entry in careful]
    elif quick != careful:
        changes["recovery"] = [_entry(entry) for entry in careful]
    if config.search.score.name == "metric" and config.data.calibration != 0:
        changes["search"] = {"score": "divergence"}
    return changes


def _cheaper(entry: PluginEntry) -> PluginEntry:
    return PluginEntry(name=entry.name, options={**entry.options, **CHEAPER.get(entry.name, {})})


def _entry(entry: PluginEntry) -> Any:
    return {"name": entry.name, "options": entry.options} if entry.options else entry.name


def _yaml_lines(sections: Mapping[str, Any]) -> list[str]:
    """Return sections as lines of YAML; values are JSON, which YAML includes."""
    lines = []
    for name, value in sections.items():
        if isinstance(value, Mapping):
            lines += [f"  {name}:", *(f"    {key}: {json.dumps(entry)}" for key, entry in value.items())]
        else:
            lines.append(f"  {name}: {json.dumps(value)}")
    return lines
