"""The search: configuration, loop, runs, results, exports, devices and benchmarks.

`secateur.search` is this package and, in the public API, the function that runs a search: calling the package calls it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Importing a subpackage binds its name in the parent, so `secateur.search` must be the package and the function at once."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from secateur.search.run.search import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
