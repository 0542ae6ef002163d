"""README.md and docs/ say what the code does: generated blocks, commands, links, configurations and Python."""

import ast
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from typer.main import get_command

import secateur
from secateur.cost_models.core import InputError
from secateur.envs.tasks.models import build_model
from secateur.envs.tasks.registry import TASKS
from secateur.envs.tasks.splits import Split, TaskData
from secateur.search.benchmarks.documentation import imports, pages, picture, reference, tables
from secateur.search.cli import app
from secateur.search.config import parse_config

ROOT = Path(__file__).resolve().parents[1]
COMMAND = get_command(app)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def inline_code(page):
    """The code in the running text of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


# ------------------------------------------------------------------------------------------------------------ generated


def test_generated_parts_are_up_to_date():
    assert list(pages.outdated(ROOT, COMMAND)) == [], f"run: {pages.COMMAND}"


@pytest.fixture
def copy(tmp_path):
    """The repository with pages that may be changed."""
    for folder in ("results", *imports.FOLDERS):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for file in [*PAGES, *map(ROOT.joinpath, picture.FILES)]:
        copied = tmp_path / file.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(file.read_bytes())
    return tmp_path


def test_a_changed_number_is_found_and_written_again(copy):
    page = copy / "docs" / "results.md"
    page.write_text(page.read_text().replace("93.39 |", "99.99 |", 1))
    assert list(pages.outdated(copy, COMMAND)) == [page]
    assert pages.update(copy, COMMAND) == [page]
    assert page.read_bytes() == (ROOT / "docs" / "results.md").read_bytes()


def test_a_picture_with_other_numbers_is_found(copy):
    file = copy / "docs" / "top1_over_macs.svg"
    file.write_text(file.read_text().replace('"dense": 93.05', '"dense": 99.05', 1))
    assert list(pages.outdated(copy, COMMAND)) == [file]


def test_pictures_hold_their_numbers():
    pytest.importorskip("matplotlib")
    shown = picture.numbers(ROOT)
    drawn = picture.draw(shown, dark=True)
    assert all(f">{label}<" in drawn for label in shown["agents"]), "labels are text, not outlines"


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="--root"):
        pages.outdated(tmp_path, COMMAND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: nonsense -->\n<!-- end -->", "unknown block `nonsense`. Known: table"),
        ("<!-- begin: table -->\n| 1 |\n", "no begin or no end"),
        ("| 1 |\n<!-- end -->", "no begin or no end"),
    ],
)
def test_broken_blocks_are_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        pages.rewrite_blocks(text, "page.md", {"table": lambda: "| 1 |"})


def test_only_blocks_are_rewritten():
    text = "before\n<!-- begin: table -->\nold\n<!-- end -->\nafter old\n"
    new = "before\n<!-- begin: table -->\n| 1 |\n<!-- end -->\nafter old\n"
    assert pages.rewrite_blocks(text, "page.md", {"table": lambda: "\n| 1 |\n"}) == new


# --------------------------------------------------------------------------------------------------------------- tables


def test_spreads_are_left_out_where_nothing_varies():
    assert tables.spread([91.0, 92.0, 93.0]) == "92.00 ± 1.00"
    assert tables.spread([91.0, 91.0]) == tables.spread([91.0]) == "91.00"


def test_best_repaired_winners_come_first():
    lines = tables.budgets_table(ROOT / "results" / "budgets", short=False).splitlines()
    head, rows = lines[0].split(" | "), [line.split(" | ") for line in lines[2:]]
    means = [float(row[head.index("mean, repaired")].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)
    shown = len(tables.budgets_table(ROOT / "results" / "budgets", short=True).splitlines())
    assert 4 < shown < len(lines), "the short table leaves agents with options out"


# ----------------------------------------------------------------------------------------------------------- references


def test_docstrings_give_meanings():
    class Options:
        """What is chosen.

        Args:
            first: one line.
            second, third: two
                lines.

        Attributes:
            fourth: after a blank line.

        Raises:
            InputError: not a key.
        """

    assert reference.meanings(Options) == {
        "first": "one line.",
        "second": "two lines.",
        "third": "two lines.",
        "fourth": "after a blank line.",
    }


def test_every_key_and_option_has_a_meaning():
    keys = [(section, key) for section, known in reference.sections().items() for key in known]
    for _, path in reference.PLUGINS.values():
        keys += [(name, key) for name, (config, _) in reference.find(path).items() for key in reference.option_keys(config)]
    assert [f"{place}.{key.name}" for place, key in keys if not key.meaning] == []


def test_every_argument_and_option_has_a_help_text():
    missing = [
        (name, one.name) for name, command in reference.commands(COMMAND).items() for one in command.params if not one.help
    ]
    assert missing == []


def test_imports_for_type_checkers_do_not_count():
    source = """
from typing import TYPE_CHECKING
import secateur.envs.core
if TYPE_CHECKING:
    from secateur.agents.core import Agent
def late():
    from secateur.search.config import load_config
"""
    assert imports.imported_modules(ast.parse(source)) == {"envs.core", "search.config"}


# --------------------------------------------------------------------------------------------------------- hand-written


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere(page):
    broken = []
    for link in (link or source for link, source in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page if not file else page.parent / file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def command_lines(page):
    """Every `secateur …` on a page, split into words."""
    code = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [*code.splitlines(), *inline_code(page)]
    return [words for line in lines if line.startswith("secateur ") and (words := shlex.split(line, comments=True))]


def command_error(words):
    """What is wrong with a command line; None if nothing is."""
    known = reference.commands(COMMAND)
    name = next((name for count in (3, 2) if (name := " ".join(words[:count])) in known), None)
    if name is None:
        return None if words[-1] == "--help" and any(other.startswith(" ".join(words[:-1])) for other in known) else "unknown"
    options = {option for parameter in known[name].params for option in parameter.opts} | {"--help"}
    rest = words[len(name.split()) :]
    unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]
    keys = [value.partition("=")[0] for word, value in zip(rest, rest[1:], strict=False) if word == "--set"]
    sections = {f"{section}.{key.name}".strip(".") for section, known in reference.sections().items() for key in known}
    unknown += [key for key in keys if key not in {*sections, "KEY", "section.key"}]
    unknown += [word for word in rest if word.startswith("configs/") and not (ROOT / word).exists()]
    return f"unknown: {unknown}" if unknown else None


def test_commands_exist_with_the_options_shown(page):
    errors = {shlex.join(words): error for words in command_lines(page) if (error := command_error(words))}
    assert errors == {}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("secateur search configs/searches/digits.yaml --set search.seed=1", False),
        ("secateur benchmark --help", False),
        ("secateur prune model", True),
        ("secateur search configs/searches/nothing.yaml", True),
        ("secateur search CONFIG --fast", True),
        ("secateur search CONFIG --set search.sead=1", True),
    ],
)
def test_wrong_commands_would_be_found(line, wrong):
    assert bool(command_error(shlex.split(line))) is wrong


def test_every_command_is_in_the_reference():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert all(f"### `{name}" in text for name in reference.commands(COMMAND))


def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [words for line in [*"\n".join(blocks(page, "sh")).splitlines(), *inline_code(page)] if (words := line.split())]
    assert [words for words in named if words[0] == "make" and words[1] not in targets] == []


def test_configurations_are_valid(page):
    for text in blocks(page, "yaml"):
        values = yaml.safe_load(text)
        if values.get("device"):
            values["device"] = str(ROOT / "configs" / "devices" / "h200.json")  # has every cost; the user's own is not here
        assert list(parse_config(values, page.name).budgets) == list(values["budgets"])


def test_python_compiles_and_names_the_public_interface_only(page):
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        if page.name == "extending.md":
            continue  # it adds to the internals
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [node for node in imported if (node.module or "").startswith("secateur")], "only `import secateur`"
        named = [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "secateur"
        ]
        assert set(named) <= set(secateur.__all__)
        of_runs = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "run"
        }
        assert of_runs <= {*dir(secateur.Run), *secateur.Run.__annotations__}


@pytest.mark.numerics
def test_the_program_for_ones_own_model_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(ROOT / "docs" / "tasks.md", "python")
    assert len(program.splitlines()) < 60
    defined = {"__name__": "own_model"}
    exec(compile(program, "tasks.md", "exec"), defined)
    best, small = defined["run"].best("camera"), defined["small"]
    sizes = [sum(p.numel() for p in network.parameters()) for network in (small, defined["model"])]
    assert best.verified and type(small) is defined["Net"] and sizes[0] < 0.5 * sizes[1]
    assert defined["accuracy"](slice(1400, None))(small) == pytest.approx(best.test_score)


OWN = """
from torch import nn

def body(inputs, *last):
    return nn.Sequential(nn.Conv2d(inputs, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), *last)

def classifier():
    return body(3, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

def segmenter():
    return body(3, nn.Conv2d(16, 4, 1))

def upscaler():
    return body(1, nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2))

def regressor():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))
"""
BOXES = """
import numpy as np
from secateur.envs.tasks.splits import Split, TaskData

def load(root, **counts):
    boxes = np.tile(np.float32([40, 40, 200, 160, 3]), (4, 1, 1))
    split = Split(np.zeros((4, 3, 320, 320), np.float32), boxes)
    names = tuple(map(str, range(10)))
    return TaskData(split, split, split, None, (0.0,) * 3, (1.0,) * 3, 10, names, f"boxes of {root}")
"""


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """The user's files that docs/tasks.md names, in the working directory."""
    numbers = np.random.default_rng(0)
    images, small = numbers.integers(0, 255, (64, 16, 16, 3), np.uint8), numbers.random((64, 1, 16, 16), np.float32)
    arrays = {
        "classes": (images, np.arange(64) % 4),
        "pixels": (images, numbers.integers(0, 4, (64, 16, 16))),
        "images": (small, small.repeat(2, 2).repeat(2, 3)),
        "numbers": (numbers.random((64, 12), np.float32), numbers.random((64, 1), np.float32)),
    }
    for name, (x, y) in arrays.items():
        np.savez(tmp_path / f"{name}.npz", x_test=x, y_test=y)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "boxes.py").write_text(BOXES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own", "boxes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def task_configurations():
    """{task: its configuration in docs/tasks.md}."""
    found = [yaml.safe_load(text) for text in blocks(ROOT / "docs" / "tasks.md", "yaml")]
    return {values["task"]: values for values in found if isinstance(values["task"], str)}


def test_every_task_has_a_configuration():
    assert set(task_configurations()) == set(TASKS)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"detection"}))
def test_the_configuration_of_each_task_works(own_files, task):
    torch.manual_seed(0)
    changes = {"search": {"agent": "uniform", "evaluations": 1, "workers": 0}, "finalize.verify": False}
    run = secateur.search(task_configurations()[task], changes)
    metric = run.document["metric"]["name"]
    assert f"{metric}_drop" in task_configurations()[task]["budgets"]["camera"]
    assert np.isfinite(run.best().test_score) and run.best().costs["macs"] <= 0.6 * run.document["dense"]["costs"]["macs"]


@pytest.mark.slow
def test_the_configuration_of_detection_works(own_files):
    pytest.importorskip("torchmetrics.detection", reason="mAP needs the extra `metrics`")
    config = task_configurations()["detection"]
    network = build_model(config["model"]["factory"], config["model"]["args"])
    torch.save(network.state_dict(), own_files / "ssdlite.pth")
    found = secateur.inspect(config)
    assert found.task.metric.name == "map" and found.graph.groups and all(row.satisfiable for row in found.feasibility)
    assert {layer.name.partition(".")[0] for layer in found.graph.geometry.layers} == {"backbone", "head"}


def test_the_plugins_that_extending_shows_work(toy):
    defined = {"__name__": "extending"}
    for code in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(compile(code, "extending.md", "exec"), defined)
    agent = defined["Halving"](defined["HalvingConfig"](), toy, toy.budgets, np.random.default_rng(0))
    episodes = toy.run(agent, 12)
    assert len(episodes) == 12 and all(episode.feasible for episode in episodes)
    images, depths = np.zeros((5, 1, 4, 4), np.float32), np.full((5, 4, 4), 2.0, np.float32)
    split = Split(images, depths)
    task = defined["Depth"](TaskData(split, split, split, None, (0.0,), (1.0,), 0, (), "of a test"))
    task.check(torch.zeros(1, 4, 4))
    assert task.evaluate(lambda x: x[:, 0] + 1.5, "test").score == pytest.approx(0.5)
    shapes = SimpleNamespace(weights=np.array([[1, 2], [3, 4]]))
    assert defined["Parameters"]().total(shapes).tolist() == [3, 7]
