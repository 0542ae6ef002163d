"""secateur: automated compression search for PyTorch vision models. This module is the public API.

Everything is imported on first use, so `import secateur` is fast and brings neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.cost_models.core import InputError
    from secateur.search.ask import ask
    from secateur.search.config import load_config
    from secateur.search.export.load import load_compressed
    from secateur.search.export.verify import verify_export as verify
    from secateur.search.run.search import resume, search

__version__ = "0.1.0"

__all__ = ["InputError", "__version__", "ask", "load_compressed", "load_config", "resume", "search", "verify"]

_HOMES = {
    "InputError": "secateur.cost_models.core:InputError",
    "ask": "secateur.search.ask:ask",
    "load_compressed": "secateur.search.export.load:load_compressed",
    "load_config": "secateur.search.config:load_config",
    "resume": "secateur.search.run.search:resume",
    "search": "secateur.search.run.search:search",
    "verify": "secateur.search.export.verify:verify_export",
}
"""{public name: "module:name" of its definition}."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `secateur` has no attribute `{name}`")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
