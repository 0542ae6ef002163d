"""Where a run comes from: data splits, versions, and the commands that reproduce it."""

from __future__ import annotations

import json
import shlex
from os.path import isfile

from secateur.search.report.data import RunData
from secateur.search.run.folder import DEVICE


def origin(run: RunData) -> list[tuple[str, str]]:
    """Return (name, text) pairs: model, data, scores, machine, versions."""
    manifest, config = run.manifest, run.config
    model = manifest["config"]["model"]
    versions = {"python": manifest.get("python"), **manifest.get("versions", {})}
    precision = manifest.get("precision")
    rows = [
        ("model", f"{model.get('factory')}, weights {model.get('weights')}, input {model.get('input')}"),
        ("data", str(manifest.get("data", ""))),
        (
            "search",
            f"maximizes {run.searched.label} on the {run.split} split; agent {config.search.agent}, seed {config.search.seed}",
        ),
        ("repair", f"{_names(config.recovery)}; finalists: {_names(config.finalize.recovery or config.recovery)}"),
        ("importance", f"{config.importance.name}; quantizer {config.quantizer.name}"),
        ("arithmetic", f"{precision['dtype']}: {precision['reason']}" if precision else ""),
        ("device", str(run.document.get("device") or "")),
        ("machine", str(manifest.get("machine", ""))),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)),
        ("commit", str(manifest.get("commit") or "")),
    ]
    return [(name, text) for name, text in rows if text]


def _names(entries: object) -> str:
    names = [entry.name for entry in entries]  # type: ignore[attr-defined]
    return ", ".join(names) or "none"


def commands(run: RunData) -> str:
    """Return the commands that repeat the run, and those that go on with it."""
    folder = shlex.quote(str(run.folder))
    lines = ["# repeat: save the configuration below as config.yaml" + f", with {DEVICE} of the run beside it" * _has_device(run)]
    lines += ["secateur search config.yaml", "", "# go on with this run", f"secateur front {folder}"]
    for name, budget in run.budgets.items():
        if budget.winner is not None:
            lines += [f"secateur export {folder} --budget {shlex.quote(name)}"]
            if (run.document["budgets"][name].get("check") or {}).get("export"):
                lines += [f"secateur verify {shlex.quote(str(run.folder / 'exports' / name))}"]
    return "\n".join([*lines, f"secateur report {folder}"])


def configuration(run: RunData) -> str:
    """Return the configuration as JSON, which is YAML too; a device is named by its file."""
    config = dict(run.manifest["config"])
    if _has_device(run):
        config["device"] = DEVICE
    return json.dumps(config, indent=1, ensure_ascii=False)


def _has_device(run: RunData) -> bool:
    return isfile(run.folder / DEVICE)
