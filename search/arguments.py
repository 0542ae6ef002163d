"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; the installed examples are found too.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust", metavar="MODULE", help="Module that the files may name; importing it runs its code. Repeat for several."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. search.evaluations=50.")
]
NewBudgets = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="NAME=LIMITS", help='Add a budget: --budget "small=macs<=35%"; repeat for several.'),
]
