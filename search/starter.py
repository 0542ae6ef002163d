"""The starter configuration of `secateur init`."""

from __future__ import annotations

import re
from pathlib import Path

from secateur.agents import AGENTS
from secateur.cost_models.core import InputError
from secateur.envs.tasks.imports import did_you_mean
from secateur.search.config import INSTALLED_CONFIGS


def starter_text(agent: str | None = None) -> str:
    """Return the starter configuration, with comments.

    Args:
        agent: a key of `AGENTS`; None: the default agent.
    Raises:
        InputError: if there is no such agent.
    """
    text = (INSTALLED_CONFIGS / "starter.yaml").read_text(encoding="utf-8")
    if agent is None:
        return text
    if agent not in AGENTS:
        raise InputError(f"There is no agent `{agent}`.{did_you_mean(agent, AGENTS)} Known: {', '.join(AGENTS)}.")
    return re.sub(r"^  agent: \w+ *#", f"  agent: {agent:<26} #", text, count=1, flags=re.MULTILINE)


def write_starter(path: Path, agent: str | None = None) -> None:
    """Write the starter configuration to a new file; see `starter_text`.

    Raises:
        InputError: if the file exists or cannot be written, or there is no such agent.
    """
    text = starter_text(agent)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} exists already. Name another file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from None
