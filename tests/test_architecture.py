"""Imports go one way: search -> agents -> secateur.envs.core -> secateur.cost_models.core, and search -> envs, cost_models."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cost_models", "envs", "agents", "search")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""{module without the leading `secateur.`: its file}."""

ALLOWED = {
    "cost_models": ("cost_models",),
    "envs": ("envs", "cost_models.core"),
    "agents": ("agents", "envs.core", "cost_models.core"),
    "search": PACKAGES,
}
"""What of ours each package may import."""

THIRD_PARTY = {"cost_models": {"numpy", "pydantic"}, "agents": {"numpy", "moocore"}}
"""What else these packages may import, besides the standard library."""

LEARNING = ("agents.amc_ddpg", "agents.envelope_ddpg")
"""The agents with networks; they may import torch and safetensors as well."""

SOLVERS = {
    "agents.spdy": {"cmaes"},
    "agents.catcma": {"cmaes"},
    "agents.integer_program": {"scipy"},
    "agents.optuna_samplers": {"optuna"},
}
"""Agents that are another library's optimizer behind `ask` and `tell`."""

ONLY_IN = {
    "ray": {"search.run.ray_cluster", "search.sweep", "search.jobs"},
    "optuna": {"search.run.study", "search.run.recorded_trials", "agents.optuna_samplers"},
    "typer": {
        "search.cli",
        "search.arguments",
        "search.benchmarks.cli",
        "search.service.cli",
        "search.cluster_cli",
        "search.remote_cli",
    },
    "yaml": {"search.config.reading"},
    "tensorboardX": {"search.tracking.tensorboard"},
    "mlflow": {"search.tracking.mlflow"},
    "wandb": {"search.tracking.wandb"},
}
"""Libraries that few modules hide from all others."""

SPINE = ("agents.core", "envs.core", "cost_models.core")
"""All of ours that the loop may know."""


@cache
def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, also in functions and for type checking only.

    "from a import b" counts as a.b where that is a module of ours; ours are named without "secateur.".
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("secateur.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            home = node.module.removeprefix("secateur.")
            parts = {f"{home}.{alias.name}" for alias in node.names}
            found.update(part if part in FILES else home for part in parts)
    return found


def within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_all_packages_are_looked_at():
    assert {name.partition(".")[0] for name in FILES} == set(PACKAGES)
    assert {"search.loop", "search.cli", *SPINE} <= set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_arrows(module):
    package = module.partition(".")[0]
    for imported in imports(FILES[module]):
        top = imported.partition(".")[0]
        if top in (*PACKAGES, "tests", "configs"):
            assert within(imported, ALLOWED[package]), f"{module} must not import {imported}"
        elif package in THIRD_PARTY and top not in sys.stdlib_module_names:
            learning = {"torch", "safetensors"} if within(module, LEARNING) else set()
            assert top in THIRD_PARTY[package] | learning | SOLVERS.get(module, set()), f"{module} must not import {imported}"
        if top in ONLY_IN:
            assert module in ONLY_IN[top], f"{imported} belongs to {ONLY_IN[top]}, but {module} imports it"


def test_the_loop_knows_the_spine_only():
    ours = {imported for imported in imports(FILES["search.loop"]) if imported.partition(".")[0] in PACKAGES}
    assert ours and all(within(imported, SPINE) for imported in ours)


@pytest.mark.parametrize("module", SPINE)
def test_the_spine_rests_on_itself(module):
    ours = {imported for imported in imports(FILES[module]) if imported.partition(".")[0] in PACKAGES}
    assert ours <= set(SPINE)


def test_nothing_imports_the_command():
    assert [module for module in FILES if "search.cli" in imports(FILES[module])] == []
    assert [module for module in FILES if "search.benchmarks.cli" in imports(FILES[module])] == ["search.cli"]


def import_cycle(graph):
    """The modules of a cycle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_there_are_no_import_cycles():
    graph = {module: imports(path) & set(FILES) - {module} for module, path in FILES.items()}
    assert import_cycle(graph) == []
    assert set(import_cycle({"a": {"b"}, "b": {"a"}})) == {"a", "b"}


def test_agents_are_known_without_torch():
    code = "import sys, secateur.agents; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_command_starts_without_heavy_imports():
    code = "import sys, secateur.search.cli; print(sorted({'torch', 'ray', 'optuna', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
