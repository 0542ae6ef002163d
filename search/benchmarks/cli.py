"""The commands under `secateur benchmark`, and `secateur support`: their options, and nothing else.

Each command imports its measurement when it runs, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.search.arguments import ConfigPath, Overrides

if TYPE_CHECKING:
    from secateur.search.config import SearchConfig

benchmark = typer.Typer(
    no_args_is_help=True,
    help="Measure agents, recoveries, importances, quantizers, predictions of accuracy, and the speed of every part.",
)

NO_RACING = "search.racing=false"
"""Override for measurements that need every evaluation to be complete: racing stops evaluations early."""

Configs = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML files, one network each.")]
Output = Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; continues what is there.")]
BudgetName = Annotated[str | None, typer.Option("--budget", help="Name of the budget; needed if there are several.")]


def _load(config: Path, overrides: Sequence[str] | None, *more: str) -> SearchConfig:
    from secateur.search.config import load_config

    return load_config(config, [*(overrides or ()), *more])


@benchmark.command("search")
def search_command(
    config: ConfigPath,
    overrides: Overrides = None,
    agent: Annotated[
        list[str] | None,
        typer.Option(help='Agent, with options if any ("envelope_ddpg envelope=true"); repeat for several. Default: all.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from the configuration's on.")] = 3,
    output: Output = Path("results/search"),
) -> None:
    """Run agents at equal evaluations over several seeds; winners are chosen on validation and scored on test images."""
    settings = _load(config, overrides, NO_RACING)
    from secateur.search.benchmarks.agents import run_agents

    run_agents(settings, agent, seeds, output)


@benchmark.command("ask")
def ask_command(
    runs: Annotated[list[Path], typer.Argument(help="Finished searches of envelope_ddpg that differ in nothing else.")],
    overrides: Overrides = None,
    queries: Annotated[
        int, typer.Option("--queries", "--questions", min=1, help="Number of queries: new budgets and preferences.")
    ] = 20,
    evaluations: Annotated[int, typer.Option(min=1, help="Proposals that are measured for each query.")] = 3,
    fresh: Annotated[int, typer.Option(min=1, help="Evaluations of a fresh bee-colony search for each query.")] = 60,
    output: Output = Path("results/ask"),
) -> None:
    """Ask the agents of runs under new budgets and preferences, and run a fresh search for each: test scores of both."""
    from secateur.search.benchmarks.queries import run_queries

    run_queries(runs, [*(overrides or ()), NO_RACING], queries, evaluations, fresh, output)


@benchmark.command("agent")
def agent_command(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the learning agent, `envelope_ddpg`: rollouts, targets, updates, ask and tell, and one evaluation."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.learner import run_learner

    run_learner(settings)


@benchmark.command("costs")
def costs_command(
    config: ConfigPath,
    overrides: Overrides = None,
    device: Annotated[Path | None, typer.Option(help="Device file, in place of the configuration's `device`.")] = None,
) -> None:
    """Measure how many policies per second every cost model evaluates, on one core."""
    settings = _load(config, overrides, *([f"device={device}"] if device else []))
    from secateur.search.benchmarks.costs import run_costs

    run_costs(settings)


@benchmark.command("recoveries")
def recoveries_command(
    configs: Configs,
    overrides: Overrides = None,
    ratio: Annotated[float, typer.Option(min=0, max=0.95, help="Share of channels that inner groups lose.")] = 0.5,
    output: Output = Path("results/recoveries"),
) -> None:
    """Prune, quantize and repair several networks in the same ways: test score of each recovery, without any search."""
    settings = [_load(config, overrides) for config in configs]
    from secateur.search.benchmarks.recoveries import run_recoveries

    run_recoveries(settings, ratio, output)


@benchmark.command("quantizers")
def quantizers_command(
    config: ConfigPath,
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help='Quantizer, with options and recoveries if any ("uniform activations=max + sequential"); repeat.'),
    ] = None,
    bits: Annotated[list[str] | None, typer.Option(help='Bits of weights, or of weights and inputs ("W4A8"); repeat.')] = None,
    output: Output = Path("results/quantizers"),
) -> None:
    """Round the weights of a network, and the inputs of its layers, in several ways: test score of each."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.quantizers import run_quantizers

    run_quantizers(settings, method, bits, output)


@benchmark.command("estimators")
def estimators_command(
    config: ConfigPath,
    overrides: Overrides = None,
    bits: Annotated[list[str] | None, typer.Option(help='Bits of weights and inputs ("W2A4"); repeat for several.')] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each estimator.")] = 3,
    output: Output = Path("results/estimators"),
) -> None:
    """Train a network with few bits in every way there is, from the same start: test scores before and after."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.estimators import run_estimators

    run_estimators(settings, bits, epochs, seeds, output)


@benchmark.command("training")
def training_command(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: BudgetName = None,
    agent: Annotated[list[str] | None, typer.Option(help="Agent whose best policy is trained; repeat for several.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations of each agent.")] = 6,
    epochs: Annotated[list[int] | None, typer.Option(min=1, help="Epochs of a training; repeat for several.")] = None,
    distillation: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Weight of the dense model's outputs; repeat for several.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings with each recipe.")] = 3,
    processes: Annotated[int, typer.Option(min=0, help="Trainings at the same time; 0: one, in this process.")] = 0,
    output: Output = Path("results/training"),
) -> None:
    """Train the best policies of several agents, shortly and long, with and without distillation: test scores."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.training import make_plan, run_training

    plan = make_plan(settings, agent, evaluations, epochs, distillation, seeds)
    run_training(settings, budget, plan, processes, output)


@benchmark.command("importances")
def importances_command(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: BudgetName = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations of each agent for each importance.")] = 100,
    importance: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: all.")] = None,
    agent: Annotated[list[str] | None, typer.Option(help="Agent that allocates the widths; repeat for several.")] = None,
    output: Output = Path("results/importances"),
) -> None:
    """Compare importances at one budget: widths allocated uniformly and by agents, scored with and without recovery."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.importances import run_importances

    run_importances(settings, budget, evaluations, importance, agent, output)


@benchmark.command("sensitivities")
def sensitivities_command(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=4, help="Number of random policies of each budget.")] = 30,
    output: Output = Path("results/sensitivities"),
) -> None:
    """Score random policies, and measure how well the sensitivities of single choices rank them."""
    settings = _load(config, overrides, NO_RACING)
    from secateur.search.benchmarks.sensitivities import run_sensitivities

    run_sensitivities(settings, policies, output)


@benchmark.command("score")
def score_command(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=2, help="Number of random policies, and of those around greedy's.")] = 10,
    budget: BudgetName = None,
    output: Output = Path("results/score"),
) -> None:
    """Score policies in every way that a search could, and compare the ranks with those of test scores after the repair."""
    settings = _load(config, overrides, NO_RACING)
    from secateur.search.benchmarks.scores import run_scores

    run_scores(settings, budget, policies, output)


@benchmark.command("prediction")
def prediction_command(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=1, help="Number of random policies.")] = 30,
    budget: BudgetName = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning.")] = 1,
    start: Annotated[str, typer.Option(help="Recovery setting whose network is fine-tuned.")] = "none",
    output: Annotated[Path, typer.Option(help="Folder for policies.jsonl and results.md; continues what is there.")] = Path(
        "results/prediction"
    ),
) -> None:
    """Fine-tune random policies, and measure how well their scores before it predict those after it."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.prediction import run_prediction

    run_prediction(settings, budget, policies, epochs, start, output)


@benchmark.command("evaluator")
def evaluator_command(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=1, help="Number of random policies of the first budget.")] = 8,
) -> None:
    """Measure an evaluation part by part, and compare it with a bare forward pass and with the straightforward way."""
    settings = _load(config, overrides, NO_RACING)
    from secateur.search.benchmarks.evaluator import run_evaluator

    run_evaluator(settings, policies)


@benchmark.command("data-free")
def data_free_command(config: ConfigPath, overrides: Overrides = None, output: Output = Path("results/data_free")) -> None:
    """Prune and quantize a network by fixed amounts and repair it without images: test top-1 of each recovery."""
    settings = _load(config, overrides)
    from secateur.search.benchmarks.data_free import run_data_free

    run_data_free(settings, output)


@benchmark.command("speed")
def speed_command(
    factories: Annotated[list[str], typer.Argument(metavar="FACTORY:HEIGHT...", help='Such as "torchvision:resnet18:224".')],
    macs: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the MACs that pruning may keep.")] = 0.2,
    multiple: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 16,
    runtime: Annotated[list[str] | None, typer.Option(help="onnxruntime, openvino; repeat for several.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of measuring each version.")] = 3.0,
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Measure networks as they are, pruned, in 8-bit integers, and both: latency, size of the file, memory."""
    from secateur.search.benchmarks.speed import SpeedConfig, run_speed

    run_speed(factories, runtime or ["onnxruntime"], SpeedConfig(macs, multiple, threads, seconds), output)


@benchmark.command("service")
def service_command(
    searches: Annotated[int, typer.Option(min=1, help="Searches in the store.")] = 1000,
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask for the list.")] = 4,
    listeners: Annotated[int, typer.Option(min=1, help="Listeners to the events of one search.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long the clients ask.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Measure the service: requests per second, their latency, and the delay of events."""
    from secateur.search.benchmarks.service import run_service

    run_service(searches, clients, listeners, seconds, output)


@benchmark.command("study")
def study_command(
    trials: Annotated[int, typer.Option(min=1, help="Number of evaluations.")] = 20_000,
    choices: Annotated[int, typer.Option(min=1, help="Number of choices in each.")] = 60,
) -> None:
    """Measure the study at the size of a long search: time of a record, of `front` and of `query`."""
    from secateur.search.benchmarks.study import run_study

    run_study(trials, choices)


def support(
    models: Annotated[list[str] | None, typer.Argument(help="Names in SUPPORT.md; default: all.")] = None,
    output: Annotated[Path, typer.Option(help="Table to write; rows of other models are kept.")] = Path("SUPPORT.md"),
) -> None:
    """Analyze, slice, compare and train models of torchvision and timm, and rewrite the support matrix. All take an hour."""
    from secateur.search.benchmarks.support import run_support

    run_support(models or None, output)


@benchmark.command("docs")
def docs_command(
    context: typer.Context,
    root: Annotated[Path, typer.Option(help="Folder of the repository: README.md, docs/ and results/.")] = Path("."),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a file differs.")] = False,
) -> None:
    """Rewrite the marked blocks of README.md and docs/, and the picture: tables from results/, references from the code."""
    from secateur.search.benchmarks.documentation.pages import run_docs

    run_docs(root.resolve(), check, context.find_root().command)
