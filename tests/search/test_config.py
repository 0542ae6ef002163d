"""Configuration files: what they mean, and what a mistake in them says."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from secateur.agents import AGENTS
from secateur.envs.calibration import CalibrationConfig
from secateur.envs.core import InputError
from secateur.envs.metric import TOP1
from secateur.envs.policy_space import SpaceConfig
from secateur.envs.tasks.data import load_data
from secateur.search.config import INSTALLED_CONFIGS, DataSection, SpaceSection, load_config, parse_config, parse_limit
from secateur.search.starter import starter_text, write_starter

MINIMAL = {
    "model": {"factory": "secateur:synthetic", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 256},
    "budgets": {"phone": {"macs": "<= 40%"}},
}


def write(tmp_path, values, name="small.yaml"):
    path = tmp_path / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def changed(dotted, value):
    """Return MINIMAL with one value put in."""
    values = json.loads(json.dumps(MINIMAL))
    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return values


def errors_of(values):
    with pytest.raises(InputError) as caught:
        parse_config(values, "small.yaml")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", sorted(INSTALLED_CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_installed_configuration_is_valid(path):
    config = load_config(path)
    assert config.budgets and config.output.prefix == path.stem


def test_defaults_are_those_of_the_parts_that_use_them():
    space = {field.name: field.default for field in dataclasses.fields(SpaceConfig)}
    assert SpaceSection().model_dump() == space
    assert parse_config(MINIMAL, "small.yaml").calibration == dataclasses.asdict(CalibrationConfig())
    signature = inspect.signature(load_data).parameters
    for name, field in DataSection.model_fields.items():
        assert name in signature
        if not field.is_required():
            assert field.default == signature[name].default, name


def test_the_starter_shows_the_defaults():
    starter, plain = load_config("configs/starter.yaml"), parse_config(MINIMAL, "small.yaml")
    for section in ("search", "space", "importance", "quantizer", "recovery", "calibration", "finalize"):
        assert getattr(starter, section) == getattr(plain, section), section
    assert starter.data.calibration == plain.data.calibration and starter.output.root == plain.output.root


@pytest.mark.parametrize("agent", AGENTS)
def test_the_starter_describes_every_agent_and_may_start_with_it(agent, tmp_path):
    described = dict(re.findall(r"^  # - (\w+): (\S.{10,})$", starter_text(), flags=re.MULTILINE))
    assert list(described) == list(AGENTS)
    write_starter(tmp_path / "mine.yaml", agent)
    assert load_config(tmp_path / "mine.yaml").search.agent == agent


def test_the_starter_of_an_unknown_agent_is_not_written(tmp_path):
    with pytest.raises(InputError, match="Did you mean `greedy`"):
        write_starter(tmp_path / "mine.yaml", "gredy")
    assert not list(tmp_path.iterdir())


def test_the_dumped_configuration_reads_back_as_the_same():
    values = changed("budgets.phone", {"macs": "<= 40%", "weight_bytes": "<= 250kB", "top1_drop": "<= 1.5"})
    values["importance"] = {"name": "taylor", "options": {}}
    values["calibration"] = {"positions": 8}
    config = parse_config(values, "small.yaml")
    dumped = json.loads(json.dumps(config.model_dump(mode="json")))
    assert parse_config(dumped, "manifest") == config
    assert dumped["budgets"]["phone"]["weight_bytes"] == "<= 250kB"
    assert dumped["calibration"]["positions"] == 8 and dumped["calibration"]["samples"] == CalibrationConfig().samples
    assert config.budgets["phone"].metric_drop(TOP1) == 0.015 and set(config.budgets["phone"].limits) == {
        "macs",
        "weight_bytes",
    }


def test_a_configuration_cannot_be_changed():
    config = parse_config(MINIMAL, "small.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.search.evaluations = 3


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("text", "value", "relative"),
    [
        ("<= 40%", 0.4, True),
        ("<=40 %", 0.4, True),
        ("40%", 0.4, True),
        ("<= 250kB", 250e3, False),
        ("<= 2 MiB", 2 * 2**20, False),
        ("<= 1.5M", 1.5e6, False),
        ("<= 1.5 G", 1.5e9, False),
        ("<= .5k", 500.0, False),
        ("<= 1e6", 1e6, False),
        (1000, 1000.0, False),
    ],
)
def test_limits(text, value, relative):
    limit = parse_limit(text)
    assert limit.value == pytest.approx(value) and limit.relative is relative


@pytest.mark.parametrize("text", [">= 40%", "< 40%", "<= -3", "forty", "", "<= 40 percent", "nan", "<= inf", True, None, [1]])
def test_what_is_no_limit(text):
    with pytest.raises(InputError):
        parse_limit(text)


def test_an_unknown_unit_gets_the_known_ones():
    with pytest.raises(InputError, match="unknown unit `Mb`.* kB, KB, MB"):
        parse_limit("<= 3Mb")


@pytest.mark.parametrize(
    ("cost", "text", "value"),
    [
        ("latency_ms", "<= 1.5", 1.5),
        ("latency_ms", "<= 1.5ms", 1.5),
        ("latency_ms", "<= 800 us", 0.8),
        ("latency_ms", "<= 2s", 2000),
        ("energy_mj", "<= 1.5 mJ", 1.5),
        ("energy_mj", "<= 2J", 2000),
    ],
)
def test_times_and_energies_have_units(cost, text, value):
    assert parse_limit(text).value == pytest.approx(value)
    device = "configs/devices/" + ("h200.json" if cost == "latency_ms" else "energy_45nm.json")
    parse_config({**MINIMAL, "device": device, "budgets": {"phone": {cost: text}}}, "small.yaml")


@pytest.mark.parametrize(
    ("device", "budget", "line"),
    [
        (
            None,
            {"latency_ms": "<= 1.5ms"},
            "small.yaml: `budgets.phone.latency_ms` needs a `device`: write `device: profile` to measure this machine, or",
        ),
        (
            "configs/devices/h200.json",
            {"energy_mj": "<= 50%"},
            "small.yaml: `budgets.phone.energy_mj` is not known of the device 'NVIDIA H200 SXM', only latency_ms: name another",
        ),
        ("configs/devices/h200.json", {"latency_ms": "<= 3kB"}, "small.yaml: budgets.phone: `latency_ms` is not measured in"),
        ("configs/devices/h200.json", {"macs": "<= 3ms"}, "small.yaml: budgets.phone: `macs` is not measured in time"),
        ("h20.json", {"macs": "<= 40%"}, "small.yaml: device: h20.json: there is no such device file."),
        (3, {"macs": "<= 40%"}, "small.yaml: device: must be the path of a device file, or `profile` (got 3)"),
    ],
)
def test_mistakes_about_the_device(device, budget, line):
    (error,) = errors_of({**MINIMAL, "device": device, "budgets": {"phone": budget}})
    assert error.startswith(line)


def test_the_device_is_kept_as_it_was_when_the_configuration_was_read(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text((INSTALLED_CONFIGS / "devices" / "h200.json").read_text())
    config = parse_config({**MINIMAL, "device": str(file)}, "small.yaml")
    dumped = json.loads(json.dumps(config.model_dump(mode="json")))
    file.unlink()
    assert parse_config(dumped, "manifest.json").device == config.device


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"mac": "<= 40%"}, "small.yaml: budgets.phone.mac: unknown cost. Did you mean `macs`?"),
        ({}, "small.yaml: budgets.phone: a budget must limit something"),
        ({"macs": "<= 250kB"}, "small.yaml: budgets.phone: `macs` is not measured in bytes"),
        ({"macs": "<= 0%"}, "small.yaml: budgets.phone: the limit of `macs` must be above zero"),
        ({"top1_drop": "<= 2%"}, "small.yaml: budgets.phone: `top1_drop` is in percentage points"),
        ({"macs": "about half"}, "small.yaml: budgets.phone.macs: a limit must read like"),
        ("<= 40%", "small.yaml: budgets.phone: must be a mapping (got '<= 40%')"),
    ],
)
def test_mistakes_in_budgets(budget, reason):
    (line,) = errors_of(changed("budgets.phone", budget))
    assert line.startswith(reason)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("dotted", "value", "line"),
    [
        ("search.evaluatons", 5, "search.evaluatons: unknown key (got 5). Did you mean `evaluations`?"),
        ("serch", {}, "serch: unknown key (got {}). Did you mean `search`?"),
        ("search.evaluations", 0, "search.evaluations: input should be greater than or equal to 1 (got 0)"),
        ("search.evaluations", True, "search.evaluations: input should be a valid integer (got True)"),
        ("search.evaluations", "many", "search.evaluations: input should be a valid integer (got 'many')"),
        ("search.workers", "all", "search.workers: must be a whole number from 0 on, or `auto` (got 'all')"),
        ("search.agent", "bee_colny", "search.agent: unknown name (got bee_colny). Did you mean `bee_colony`?"),
        ("search.options", {"limt": 5}, "search.options: `bee_colony` has no option `limt`. Did you mean `limit`?"),
        (
            "search.options",
            {"limit": "x"},
            "search.options: `bee_colony`: option `limit`: input should be a valid integer",
        ),
        ("search", 3, "search: must be a mapping (got 3)"),
        ("data.name", "cifar", "data.name: unknown data set (got cifar). Did you mean `cifar10`?"),
        ("data.validation", 0, "data.validation: must be a whole number from 1 on, or `rest` (got 0)"),
        ("data.validation_from", "train_", "data.validation_from: input should be 'test' or 'train' (got 'train_')"),
        ("importance", "l1", "importance: unknown name (got l1)."),
        (
            "importance",
            {"name": "l1_norm", "opts": {}},
            "importance.opts: unknown key (got {}). Did you mean `options`?",
        ),
        ("quantizer", "unifrom", "quantizer: unknown name (got unifrom). Did you mean `uniform`?"),
        ("recovery", ["batchnorm"], "recovery.0: unknown name (got batchnorm). Did you mean `batch_norm`?"),
        (
            "calibration.positons",
            3,
            "calibration: `calibration` has no option `positons`. Did you mean `positions`? Known: max_images,",
        ),
        ("calibration.positions", 0, "calibration: `calibration`: `positions` of the calibration must be in [1, 100000]"),
        (
            "calibration.seed",
            "x",
            "calibration: `calibration`: option `seed`: input should be a valid integer",
        ),
        ("calibration", 3, "calibration: must be a mapping (got 3)"),
        ("space.prune_ratio", [0.5, 1.0], "space: `space.prune_ratio` must be [least, largest]"),
        ("space.weight_bits", [1], "space: `space.weight_bits` must be 2..8"),
        ("model.part", [], "model.part: tuple should have at least 1 item"),
        ("model.input", [], "model.input: tuple should have at least 1 item"),
        ("budgets", {}, "budgets: dictionary should have at least 1 item"),
        ("budgets", {"my phone": {"macs": "<= 40%"}}, "budgets.my phone: may hold letters, digits, `_` and `-` only"),
        ("output.name", "../elsewhere", "output.name: may hold letters, digits, `_` and `-` only"),
        ("finalize", None, "finalize: must be a mapping (got None)"),
    ],
)
def test_each_mistake_is_one_line_with_place_and_way_out(dotted, value, line):
    (only,) = errors_of(changed(dotted, value))
    assert only.startswith(f"small.yaml: {line}")


def test_missing_sections_and_all_errors_come_at_once():
    values = {"model": {"factory": 3}, "data": {"name": "digits", "validation": 10, "calibrate": 3}, "recovery": ["x"]}
    assert [line.split(" ")[1] for line in errors_of(values)] == [
        "model.factory:",
        "model.input:",
        "data.calibrate:",
        "recovery.0:",
        "budgets:",
    ]


def test_a_key_given_twice_is_an_error(tmp_path):
    text = "search:\n  seed: 1\n  seed: 2\n"
    with pytest.raises(InputError, match=r"small.yaml: is not valid YAML: the key `seed` is given twice \(line 2"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "just words", "\t- x: 1"])
def test_what_is_no_mapping(tmp_path, text):
    with pytest.raises(InputError, match="small.yaml: (is not valid YAML|must be a mapping)"):
        load_config(write(tmp_path, text))


def test_a_missing_file_gets_a_suggestion(tmp_path):
    with pytest.raises(InputError, match="no such file. Did you mean `configs/searches/digits.yaml`"):
        load_config("configs/searches/digit.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(binary)


def test_installed_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/searches/digits.yaml").data.name == "digits"
    (tmp_path / "configs" / "searches").mkdir(parents=True)
    write(tmp_path / "configs" / "searches", MINIMAL, "digits.yaml")
    assert load_config(Path("configs/searches/digits.yaml")).data.name != "digits"  # the user's own file comes first


# ------------------------------------------------------------------------------------------------------------ overrides


def test_overrides_win_over_the_file_and_may_open_sections(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(
        path, ["search.evaluations=7", "space.weight_bits=[4, 8]", "budgets.phone.macs=<= 30%", "data.root=/some/where"]
    )
    assert config.search.evaluations == 7 and config.space.weight_bits == (4, 8) and config.data.root == "/some/where"
    assert config.budgets["phone"].limits["macs"].value == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("search.evaluations", " search.evaluations: must read section.key=value"),
        ("=3", " =3: must read section.key=value"),
        ("search..seed=3", " search..seed=3: must read section.key=value"),
        ("model.factory.x=3", " model.factory.x=3: `factory` is not a section"),
        ("search.seed=[", " search.seed=[: the value is not valid YAML"),
        ("search.sed=3", ": search.sed: unknown key (got 3). Did you mean `seed`?"),
        ("search.seed=x", ": search.seed: input should be a valid integer (got 'x')"),
    ],
)
def test_mistakes_in_overrides_name_the_argument_or_the_option(tmp_path, override, line):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, MINIMAL), [override])
    assert caught.value.command.startswith(f"--set{line}")
    assert str(caught.value).startswith(f"overrides{line}".replace("overrides ", "overrides: "))


def test_overrides_may_be_a_mapping_with_values_of_python(tmp_path):
    path = write(tmp_path, MINIMAL)
    changes = {"search.evaluations": 7, "space.weight_bits": (4, 8), "data.root": Path("some/where")}
    config = load_config(path, changes)
    assert config == load_config(path, ["search.evaluations=7", "space.weight_bits=[4, 8]", "data.root=some/where"])
    with pytest.raises(InputError, match="overrides: search.sed: unknown key"):
        load_config(path, {"search.sed": 3})


def test_a_dict_is_read_like_a_file_and_left_as_it_was(tmp_path):
    values = json.loads(json.dumps(MINIMAL))
    config = load_config(values, {"search.seed": 3})
    assert values == MINIMAL
    assert config == load_config(write(tmp_path, MINIMAL, "search.yaml"), ["search.seed=3"])
    with pytest.raises(InputError, match="^config: serch: unknown key"):
        load_config({**MINIMAL, "serch": {}})


def test_a_configuration_can_be_changed_by_overrides_only_into_another_one():
    config = load_config(MINIMAL)
    assert load_config(config) is config
    other = load_config(config, {"search.seed": 3, "budgets.phone.macs": "<= 30%"})
    assert other == load_config(MINIMAL, {"search.seed": 3, "budgets.phone.macs": "<= 30%"}) and config.search.seed == 0
