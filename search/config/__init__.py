"""The configuration of a search: YAML or plain dicts, read into frozen models that report every mistake with its place.

limits.py    budgets: what "<= 40%" and "<= 250kB" mean
plugins.py   names and options of agents, importances, quantizers and recoveries
sections.py  the sections, and the whole `SearchConfig`
reading.py   files, dicts and overrides; the messages
"""

from __future__ import annotations

from secateur.search.config.limits import BudgetConfig, Limit, budget_override, parse_limit, split_limits
from secateur.search.config.plugins import PluginEntry
from secateur.search.config.reading import (
    INSTALLED_CONFIGS,
    ConfigSource,
    Overrides,
    apply_override,
    apply_overrides,
    config_values,
    find_config,
    load_config,
    override_values,
    parse_config,
)
from secateur.search.config.sections import (
    LEAST_CHECKED,
    DataSection,
    DeviceProfile,
    ModelSection,
    OutputSection,
    SearchConfig,
    SpaceSection,
)

__all__ = [
    "INSTALLED_CONFIGS",
    "LEAST_CHECKED",
    "BudgetConfig",
    "ConfigSource",
    "DataSection",
    "DeviceProfile",
    "Limit",
    "ModelSection",
    "OutputSection",
    "Overrides",
    "PluginEntry",
    "SearchConfig",
    "SpaceSection",
    "apply_override",
    "apply_overrides",
    "budget_override",
    "config_values",
    "find_config",
    "load_config",
    "override_values",
    "parse_config",
    "parse_limit",
    "split_limits",
]
