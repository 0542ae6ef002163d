"""The search: configuration, loop, runs, results, exports, devices and benchmarks.

`secateur.search` is this package, and it is also the function that runs a search:

    run = secateur.search("configs/searches/digits.yaml", {"search.evaluations": 50})
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from secateur.search.config import ConfigSource, Overrides
    from secateur.search.run.handle import Run
    from secateur.search.run.progress import SearchProgress


class _CallablePackage(ModuleType):
    """The package as a function: importing a subpackage binds its name in the parent, so that one name must be both."""

    def __call__(
        self,
        config: ConfigSource | nn.Module,
        overrides: Overrides = (),
        progress: SearchProgress | bool = False,
        **objects: Any,
    ) -> Run:
        """Run a search and return its run; see `secateur.search.run.handle.search`."""
        from secateur.search.run.handle import search

        return search(config, overrides, progress, **objects)


sys.modules[__name__].__class__ = _CallablePackage
