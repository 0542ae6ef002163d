"""The verbs under `secateur benchmark`. They import what they need when they run, so that `--help` comes at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from secateur.cost_models.core import InputError
from secateur.search.arguments import ConfigPath, Overrides

benchmark = typer.Typer(
    no_args_is_help=True, help="Measure agents, recoveries, importances, the worth of the reward, or the cost models' speed."
)


def _write_report(output: Path, table: str) -> None:
    (output / "results.md").write_text(table, encoding="utf-8")


def _measure_rows(output: Path, name: str, measure: Callable[..., object], report: Callable[..., str]) -> None:
    """Measure what is missing in a folder of results, printing rows as they come; results.md always follows what is there."""
    from secateur.search.benchmarks.records import Records
    from secateur.search.run.progress import SearchProgress

    records = Records(output / "results.jsonl", {"benchmark": name})
    with SearchProgress(Console(stderr=True)) as progress:

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, report(records.rows))

        measure(records, progress.status, on_row)
    table = report(records.rows)
    _write_report(output, table)  # also where every row was there already
    print(table)
    print(f"results: {output}")


@benchmark.command("search")
def benchmark_search(
    config: ConfigPath,
    overrides: Overrides = None,
    agent: Annotated[
        list[str] | None,
        typer.Option(help='Agent, with options if any ("envelope_ddpg envelope=true"); repeat for several. Default: all.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from the configuration's on.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/search"
    ),
) -> None:
    """Run agents at equal evaluations over several seeds; winners are chosen on validation and scored on test images."""
    from secateur.search.config import load_config

    # Runs share what was evaluated, and no run's policies may be stopped by those of another one.
    overrides = [*(overrides or ()), "search.racing=false"]
    settings = load_config(config, overrides)
    from secateur.agents import AGENTS
    from secateur.search.benchmarks import agents as measure
    from secateur.search.benchmarks.records import Records, config_record
    from secateur.search.build import build_problem, open_runner
    from secateur.search.results.finalize import dense_test_score
    from secateur.search.run.progress import SearchProgress

    contestants = [measure.contestant(text, settings) for text in agent or AGENTS]
    records = Records(output / "results.jsonl", {"benchmark": "search", "config": config_record(settings)})
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.status)
        progress.status("starting the workers")
        runner = open_runner(problem)
        progress.stop()
        dense = dense_test_score(problem).top1

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, measure.search_report(problem, dense, records.rows))

        all_seeds = range(settings.search.seed, settings.search.seed + seeds)
        try:
            measure.run_contestants(problem, runner, contestants, all_seeds, settings.search.evaluations, records, on_row)
        finally:
            runner.close()
    table = measure.search_report(problem, dense, records.rows)
    _write_report(output, table)
    print(table)
    print(f"results: {output}")


@benchmark.command("ask")
def benchmark_ask(
    runs: Annotated[list[Path], typer.Argument(help="Finished searches of envelope_ddpg that differ in nothing else.")],
    overrides: Overrides = None,
    questions: Annotated[int, typer.Option(min=1, help="How many new budgets and preferences.")] = 20,
    evaluations: Annotated[int, typer.Option(min=1, help="Proposals that are measured for each question.")] = 3,
    fresh: Annotated[int, typer.Option(min=1, help="Evaluations of a fresh bee-colony search for each question.")] = 60,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/ask"
    ),
) -> None:
    """Ask the runs' agents under new budgets and preferences, and search each afresh: test scores of both."""
    from secateur.search.ask import agent_folder, load_agent
    from secateur.search.benchmarks import questions as measure
    from secateur.search.benchmarks.records import Records
    from secateur.search.build import build_problem, open_runner
    from secateur.search.run.folder import load_manifest
    from secateur.search.run.progress import SearchProgress

    settings = [load_manifest(run, [*(overrides or ()), "search.racing=false"])[0] for run in runs]
    for run, own in zip(runs, settings, strict=True):
        agent_folder(run, own)  # before anything is written
    shared = measure.shared_config(runs, settings)
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings[0], progress.status)
        agents = [load_agent(run, own, problem.space) for run, own in zip(runs, settings, strict=True)]
        drawn = measure.draw_questions(problem.space, problem.budgets, questions, seed=0)
        counts = {"learned": measure.shared_experience(runs, agents), "evaluations": evaluations, "fresh": fresh}
        records = Records(output / "results.jsonl", {"benchmark": "ask", "config": shared, **counts})
        progress.status("starting the workers")
        runner = open_runner(problem)
        progress.stop()

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, measure.question_report(records.rows, evaluations, fresh))

        try:
            for own, agent in zip(settings, agents, strict=True):
                who = measure.agent_name(own), own.search.seed
                measure.answer_questions(problem, agent, *who, runner, drawn, evaluations, fresh, records, on_row)
        finally:
            runner.close()
    table = measure.question_report(records.rows, evaluations, fresh)
    _write_report(output, table)
    print(table)
    print(f"results: {output}")


@benchmark.command("agent")
def benchmark_agent(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the learning agent, `envelope_ddpg`: rollouts, targets, updates, ask and tell, beside one evaluation."""
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
    from secateur.search.benchmarks.learner import benchmark_learner, speed_lines
    from secateur.search.build import build_options, build_problem, make_env
    from secateur.search.run.progress import SearchProgress

    options = settings.search.options if settings.search.agent == "envelope_ddpg" else {}
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.status)
        progress.status("measuring")
        speed = benchmark_learner(problem, build_options(EnvelopeDdpgConfig, options), make_env(problem))
    print("\n".join(speed_lines(speed)))


@benchmark.command("costs")
def benchmark_costs(
    config: ConfigPath,
    overrides: Overrides = None,
    device: Annotated[Path | None, typer.Option(help="Device file, in place of the configuration's `device`.")] = None,
) -> None:
    """Print how many policies per second every cost model answers, on one core."""
    from secateur.search.config import load_config

    settings = load_config(config, [*(overrides or ()), *([f"device={device}"] if device else [])])
    import torch

    from secateur.search.benchmarks.costs import benchmark_costs as measure
    from secateur.search.build import build_costs, build_model_and_graph

    torch.set_num_threads(1)
    _, _, graph = build_model_and_graph(settings)
    costs = build_costs(settings, graph)
    print("| cost | policies/s | with decoding of the policies |")
    print("|---|---|---|")
    for speed in measure(costs):
        print(f"| {speed.cost} | {speed.policies_per_second:,.0f} | {speed.with_decoding:,.0f} |")


Configs = Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML files, one network each.")]


@benchmark.command("recoveries")
def benchmark_recoveries(
    configs: Configs,
    overrides: Overrides = None,
    ratio: Annotated[float, typer.Option(min=0, max=0.95, help="Share of channels that inner groups lose.")] = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/recoveries"
    ),
) -> None:
    """Prune, quantize and repair several networks alike: test top-1 of each recovery, without any search."""
    from secateur.search.config import load_config

    settings = [load_config(config, overrides or ()) for config in configs]
    from secateur.search.benchmarks.recoveries import compare_recoveries, recovery_report

    _measure_rows(output, "recoveries", partial(compare_recoveries, settings, ratio), recovery_report)


@benchmark.command("quantizers")
def benchmark_quantizers(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/quantizers"
    ),
) -> None:
    """Round the weights of a network to 4, 3 and 2 bits in several ways: test top-1 of each."""
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.search.benchmarks.quantizers import compare_quantizers, quantizer_report

    _measure_rows(output, "quantizers", partial(compare_quantizers, settings), quantizer_report)


@benchmark.command("importances")
def benchmark_importances(
    config: ConfigPath,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Name of the budget; needed if there are several.")] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Evaluations of each agent for each importance.")] = 100,
    importance: Annotated[list[str] | None, typer.Option(help="Repeat for several. Default: all.")] = None,
    agent: Annotated[list[str] | None, typer.Option(help="Who allocates the widths; repeat for several.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/importances"
    ),
) -> None:
    """Compare importances at one budget: widths allocated uniformly and by agents, scored with and without recovery."""
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.agents import AGENTS
    from secateur.envs.pruning.importance import IMPORTANCES
    from secateur.search.benchmarks import importances as measure
    from secateur.search.benchmarks.records import Records, config_record
    from secateur.search.benchmarks.recovered import calibrated_problem
    from secateur.search.results.finalize import dense_test_score
    from secateur.search.run.progress import SearchProgress

    names = list(importance or IMPORTANCES)
    agents = list(agent or (known for known in measure.ALLOCATING_AGENTS if known in AGENTS))
    for override in (*(f"importance={name}" for name in names), *(f"search.agent={name}" for name in agents)):
        load_config(config, [*(overrides or ()), "search.options={}", override])  # unknown names end here
    with SearchProgress(Console(stderr=True)) as progress:
        problem = calibrated_problem(settings, progress.status)
        chosen = measure.choose_budget(problem, budget)
        header = {"benchmark": "importances", "config": config_record(settings)}
        records = Records(output / "results.jsonl", {**header, "budget": chosen.name, "evaluations": evaluations})
        dense = dense_test_score(problem).top1
        progress.stop()

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, measure.importance_report(problem, chosen, dense, records.rows))

        measure.compare_importances(problem, chosen, names, agents, evaluations, records, on_row)
    print(measure.importance_report(problem, chosen, dense, records.rows))
    print(f"results: {output}")


@benchmark.command("sensitivities")
def benchmark_sensitivities(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=4, help="Number of random policies of each budget.")] = 30,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/sensitivities"
    ),
) -> None:
    """Score random policies, and tell how well the sensitivities of single choices ranked them before."""
    from secateur.search.config import load_config

    settings = load_config(config, [*(overrides or ()), "search.racing=false"])
    from secateur.search.benchmarks import sensitivities as measure
    from secateur.search.benchmarks.records import Records, config_record
    from secateur.search.build import build_problem, with_sensitivities
    from secateur.search.run.progress import SearchProgress

    header = {"benchmark": "sensitivities", "config": config_record(settings)}
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.status)
        records = Records(output / "results.jsonl", header)
        problem = with_sensitivities(problem, progress.status)
        progress.stop()

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, measure.sensitivity_report(problem, records.rows))

        measure.compare_sensitivities(problem, policies, records, on_row)
    table = measure.sensitivity_report(problem, records.rows)
    _write_report(output, table)
    print(table)
    print(f"results: {output}")


@benchmark.command("prediction")
def benchmark_prediction(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=1, help="Number of random policies.")] = 30,
    budget: Annotated[str | None, typer.Option(help="Name of the budget; needed if there are several.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of fine-tuning.")] = 1,
    start: Annotated[str, typer.Option(help="Recovery whose network is fine-tuned.")] = "none",
    output: Annotated[Path, typer.Option(help="Folder for policies.jsonl and results.md; goes on with what is there.")] = Path(
        "results/prediction"
    ),
) -> None:
    """Fine-tune random policies, and tell how well their scores before it predicted those after it."""
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.search.benchmarks import prediction as measure
    from secateur.search.benchmarks.importances import choose_budget
    from secateur.search.benchmarks.recovered import calibrated_problem
    from secateur.search.run.progress import SearchProgress

    measure.check_start(start)
    with SearchProgress(Console(stderr=True)) as progress:
        train = measure.training_images(settings)
        problem = calibrated_problem(settings, progress.status)
        chosen = choose_budget(problem, budget)
        experiment = measure.Experiment(problem, train, start, measure.default_tuning(epochs, settings.search.seed))
        records = measure.open_records(output / "policies.jsonl", experiment, chosen)
        drawn = measure.random_policies(problem, chosen, policies)
        progress.stop()

        def on_row(line: str) -> None:
            print(line, flush=True)
            _write_report(output, measure.prediction_report(experiment, chosen, records.rows))

        measure.measure_prediction(experiment, drawn, records, measure.processes(settings), on_row)
    print(measure.prediction_report(experiment, chosen, records.rows))
    print(f"results: {output}")


@benchmark.command("evaluator")
def benchmark_evaluator(
    config: ConfigPath,
    overrides: Overrides = None,
    policies: Annotated[int, typer.Option(min=1, help="Number of random policies of the first budget.")] = 8,
) -> None:
    """Print what an evaluation takes, part by part, against a bare forward pass and against the straightforward way."""
    from secateur.search.config import load_config

    settings = load_config(config, [*(overrides or ()), "search.racing=false"])
    import torch

    from secateur.search.benchmarks import evaluator as measure
    from secateur.search.build import build_problem, open_runner
    from secateur.search.run.progress import SearchProgress
    from secateur.search.run.ray_runner import available_cores

    try:
        import torch_pruning
    except ImportError:
        torch_pruning = None
    torch.set_num_threads(available_cores())
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.status)
        progress.note(f"evaluations in {problem.precision.dtype}: {problem.precision.reason}")
        drawn = measure.random_sequences(problem, policies)
        chosen = [problem.space.decode(table) for table in drawn]

        def on_policy(done: int) -> None:
            progress.status(f"policy {done} of {policies}")

        times = measure.measure_evaluations(problem, chosen, torch_pruning, on_policy)
        progress.status("starting the workers")
        runner = open_runner(problem)
        try:
            tables = measure.random_sequences(problem, policies + runner.slots)
            rate = measure.evaluations_per_second(runner, problem, tables)
        finally:
            runner.close()
    print(measure.speed_table(times))
    print(f"\nMedians over {policies} policies, {torch.get_num_threads()} torch threads, {problem.dense.images} images.")
    print(f"In a search: {rate:.2f} evaluations/s, {runner.slots} at the same time with one thread each.")


@benchmark.command("data-free")
def benchmark_data_free(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and results.md; goes on with what is there.")] = Path(
        "results/data_free"
    ),
) -> None:
    """Prune and quantize a network by fixed amounts and repair it without images: test top-1 of each recovery."""
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.search.benchmarks.data_free import compare_data_free, data_free_report

    _measure_rows(output, "data_free", partial(compare_data_free, settings), data_free_report)


@benchmark.command("speed")
def benchmark_speed(
    factories: Annotated[list[str], typer.Argument(metavar="FACTORY:HEIGHT...", help='Such as "torchvision:resnet18:224".')],
    macs: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the MACs that pruning may keep.")] = 0.2,
    multiple: Annotated[int, typer.Option(min=1, help="Widths are multiples of this.")] = 16,
    runtime: Annotated[list[str] | None, typer.Option(help="onnxruntime, openvino; repeat for several.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the runtime.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of measuring each version.")] = 3.0,
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
) -> None:
    """Measure networks as they are, pruned, in 8-bit integers, and both: latency, size of the file, memory."""
    from secateur.search.benchmarks import speed as measure
    from secateur.search.profiling.profiler import describe_machine
    from secateur.search.profiling.runtimes import find_runtime
    from secateur.search.run.progress import SearchProgress

    runtimes = [find_runtime(name) for name in runtime or ["onnxruntime"]]
    versions = [f"{chosen.name} {chosen.version()}" for chosen in runtimes]
    lines = []
    with SearchProgress(Console(stderr=True)) as progress:
        for factory in factories:
            name, size = _factory_and_size(factory)
            model, graph = measure.random_model(name, size)
            for chosen in runtimes:
                progress.status(f"{name}, {chosen.name}")
                found = measure.measure_speed(
                    model, graph, (3, size, size), macs, multiple, chosen.name, threads=threads, seconds=seconds
                )
                label = f"{name.partition(':')[2]} ({size} px), {chosen.name}"
                lines += measure.speed_rows(label, found)
    table = "\n".join([*measure.SPEED_HEADER, *lines])
    machine = describe_machine()
    used = f"{threads} thread{'s' * (threads > 1)}; one image; float layers in float32."
    note = f"{machine['processor']}, {machine['cores']} cores; {', '.join(versions)}; {used}"
    print(f"{table}\n\n{note}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{table}\n\n{note}\n", encoding="utf-8")


def _factory_and_size(text: str) -> tuple[str, int]:
    """Return ("module:function", height) of "module:function:height"."""
    factory, _, size = text.rpartition(":")
    if not size.isdigit() or ":" not in factory:
        raise InputError(f"`{text}` must read FACTORY:HEIGHT, such as torchvision:resnet18:224.")
    return factory, int(size)
