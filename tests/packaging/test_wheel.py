"""The wheel, installed into a fresh environment and used in a folder whose files have the names of our packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import secateur

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("agents", "configs", "cost_models", "envs", "search")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "secateur", *PACKAGES)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

MINE = "raise ImportError('this file belongs to the user')\n"
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.linear = nn.Linear(width, 6)

    def forward(self, x):
        return self.linear(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))

def net(width=8):
    torch.manual_seed(0)
    return Net(width)
"""
CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 256, "train": "rest", "calibration": 64},
    "search": {"agent": "random", "evaluations": 4, "workers": 2, "precision": "float32"},
    "budgets": {"phone": {"macs": "<= 60%"}, "watch": {"macs": "<= 40%"}},
    "finalize": {"top": 1},
}


def run(command, **options):
    """Run a command without the paths of this process; return its output."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= options.pop("env", {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, so that nothing built earlier gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source")
    run([*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, folder / "source"])
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run([*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # A path in a .pth file comes after the wheel, and .pth files at that path are not read: no editable install gets in.
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return python


@pytest.fixture(scope="module")
def work(python, tmp_path_factory):
    """A folder of the user with modules of our names, and with a package of networks."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("search.py", "cost_models.py", "envs/__init__.py", "agents/__init__.py", "configs/mine.yaml", "mine/nets.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text({"mine.yaml": yaml.safe_dump(CONFIG), "nets.py": NETWORK}.get(Path(name).name, MINE))

    def in_folder(*command):
        return run(command, cwd=folder, env={"SECATEUR_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"})

    return folder, in_folder


def assert_winners_are_verified(folder):
    budgets = json.loads((folder / "front.json").read_text())["budgets"]
    for name, budget in budgets.items():
        assert budget["check"]["passed"] is True, (name, budget["check"])
        assert (folder / "exports" / name / "verify.json").is_file()


def test_the_wheel_holds_one_package_of_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert all(archive.getinfo(name).external_attr >> 28 != 0xA for name in names)  # 0xA: a symbolic link
        metadata = archive.read(f"secateur-{secateur.__version__}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"secateur", f"secateur-{secateur.__version__}.dist-info"}
    expected = {
        f"secateur/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".json")
    }
    assert expected | {"secateur/__init__.py", "secateur/__main__.py", "secateur/py.typed"} <= names
    assert "License-Expression: MIT" in metadata and "Author: secateur developers" in metadata
    assert f"secateur-{secateur.__version__}.dist-info/licenses/LICENSE" in names


def test_the_command_searches_beside_the_users_own_modules(work, python):
    folder, in_folder = work
    command = python.with_name("secateur")
    assert "satisfiable" in in_folder(command, "inspect", "configs/mine.yaml")
    assert "run: runs/mine-1" in in_folder(command, "search", "configs/mine.yaml")
    assert_winners_are_verified(folder / "runs" / "mine-1")
    export = "runs/mine-1/exports/phone"
    assert f"verified: {export}" in in_folder(python, "-m", "secateur", "verify", export)
    assert "wrote" in in_folder(command, "init", "--agent", "nsga2")
    assert "dense" in in_folder(command, "inspect", "configs/searches/digits.yaml")  # installed, not among the user's files


def test_python_searches_with_a_network_of_the_users(work, python):
    folder, in_folder = work
    changes = {"model.factory": "mine.nets:net", "model.weights": None, "output.root": "own"}
    code = f"""
import secateur
assert secateur.__file__.startswith({str(python.parents[1])!r}), secateur.__file__
assert secateur.__version__ == {secateur.__version__!r}
run = secateur.search("configs/mine.yaml", {changes!r})
assert run.best("watch").verified, run.document["budgets"]
import torch
assert run.best("watch").model()(torch.zeros(1, 3, 8, 8)).shape == (1, 6)
import sys
assert not {set(PACKAGES)!r} & set(sys.modules)
print(len(run.trials))
"""
    assert in_folder(python, "-c", code).strip() == "4"
    assert_winners_are_verified(folder / "own" / "mine-1")
