"""secateur: automated compression search for PyTorch vision models. This module is the public API.

    search(config, overrides)   run a search; returns a `Run`. Also search(model, inputs=..., calibration=..., evaluate=...)
    resume(run)                 continue an interrupted run, or extend a finished one
    load_run(folder)            the `Run` in a folder: front and trials as tables, winners, exports
    query(runs, where=...)      evaluations of one run or many as a table: a condition, sorted and cut
    ask(run, budget)            policies for any budget from the agent of a finished run
    finalize(run, epochs=...)   train the winners with distillation from the dense model, export and verify them
    report(runs, output)        write an HTML page about one run, or about several
    export(run, budget=...)     write compressed models: JSON, safetensors, ONNX
    apply(policy, weights)      put a policy on other weights of the same architecture, export and verify it
    verify(folder)              check what an export promises, from its files
    load_compressed(folder)     the exported model as a torch.nn.Module
    save_compressed(model, folder)   write and verify it again after training
    inspect(config)             layers, coupled groups, costs, and which budgets can be met
    connect(url)                a service of `secateur serve` on another machine
    profile(config)             measure this machine and write a device file
    load_config(source)         the configuration in a file or a dict
    Metric                      name, direction and range of a metric of your own
    Tracker                     follows a search: a method for each event
    InputError                  raised for input that cannot be used; a ValueError

Each is imported when it is first used, so `import secateur` is fast and imports neither torch nor Ray. Modules below this one
are internal: they can change in any version.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.cost_models.core import InputError
    from secateur.envs.metric import Metric
    from secateur.search.apply import apply
    from secateur.search.ask import ask
    from secateur.search.client import connect
    from secateur.search.config import load_config
    from secateur.search.export.load import load_compressed
    from secateur.search.export.run_exports import export
    from secateur.search.export.save import save_compressed
    from secateur.search.export.verify import verify_export as verify
    from secateur.search.inspection import inspect
    from secateur.search.profiling.profile_run import profile
    from secateur.search.report.write import report
    from secateur.search.results.query import query
    from secateur.search.run.handle import Run, finalize, load_run, resume, search
    from secateur.search.tracking.core import Tracker

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Metric",
    "Run",
    "Tracker",
    "__version__",
    "apply",
    "ask",
    "connect",
    "export",
    "finalize",
    "inspect",
    "load_compressed",
    "load_config",
    "load_run",
    "profile",
    "report",
    "query",
    "resume",
    "save_compressed",
    "search",
    "verify",
]

_HOMES = {
    "InputError": "secateur.cost_models.core:InputError",
    "Metric": "secateur.envs.metric:Metric",
    "Run": "secateur.search.run.handle:Run",
    "Tracker": "secateur.search.tracking.core:Tracker",
    "apply": "secateur.search.apply:apply",
    "ask": "secateur.search.ask:ask",
    "connect": "secateur.search.client:connect",
    "export": "secateur.search.export.run_exports:export",
    "finalize": "secateur.search.run.handle:finalize",
    "inspect": "secateur.search.inspection:inspect",
    "load_compressed": "secateur.search.export.load:load_compressed",
    "load_config": "secateur.search.config:load_config",
    "load_run": "secateur.search.run.handle:load_run",
    "profile": "secateur.search.profiling.profile_run:profile",
    "report": "secateur.search.report.write:report",
    "query": "secateur.search.results.query:query",
    "resume": "secateur.search.run.handle:resume",
    "save_compressed": "secateur.search.export.save:save_compressed",
    "verify": "secateur.search.export.verify:verify_export",
}
"""{public name: "module:name" of its definition}."""


def __getattr__(name: str) -> Any:
    if name == "search":  # the package is the function, see search/__init__.py
        return importlib.import_module("secateur.search")
    if name not in _HOMES:
        raise AttributeError(f"module `secateur` has no attribute `{name}`")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
