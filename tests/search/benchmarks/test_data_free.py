"""The comparison of recoveries without images: its policies, and a run on the synthetic task."""

import torch

from secateur.envs.model_graph import analyze
from secateur.envs.tasks.cifar_resnet import resnet20, vgg16_bn
from secateur.search.benchmarks.data_free import CASES, Case, case_policy, compare_data_free, data_free_report
from secateur.search.benchmarks.records import Records
from secateur.search.config import parse_config

VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "calibration": 0, "validation": 20, "test": 40},
    "recovery": ["least_squares"],
    "budgets": {"small": {"macs": "<= 50%"}},
}


def bits_of(model, case):
    graph = analyze(model.eval(), (torch.zeros(1, 3, 32, 32),), verify=False)
    policy = case_policy(graph, case)
    return policy, {layer.name: bits for layer, bits in zip(graph.geometry.layers, policy.weight_bits, strict=True)}


def test_inside_of_blocks_is_low_and_chains_take_turns():
    case = Case(0.0, (2, 6), {})
    policy, bits = bits_of(resnet20(), case)
    assert {name for name, b in bits.items() if b == 2} == {name for name in bits if name.endswith(".conv1")}
    assert len(set(bits.values())) == 2 and case.methods.keys() != CASES[0].methods.keys()
    _, bits = bits_of(vgg16_bn(), case)
    assert list(bits.values()) == [2, 6] * 7


def test_every_inner_group_loses_the_same_share():
    policy, bits = bits_of(resnet20(), Case(0.25, (4, 4), {}))
    groups = analyze(resnet20().eval(), (torch.zeros(1, 3, 32, 32),), verify=False).groups
    assert set(bits.values()) == {4}
    for group, width in zip(groups, policy.widths, strict=True):
        inner = group.name.startswith("layer") and group.name.endswith(".conv1")
        assert width == (0.75 if inner else 1) * group.units


def test_rows_are_measured_once_and_need_no_images(tmp_path):
    config, said = parse_config(VALUES, "test.yaml"), []
    cases = (Case(0.5, (4, 4), {"synthetic_net": (12.34, 56.78)}), Case(0.0, (2, 6), {}))
    for _ in range(2):
        records = Records(tmp_path / "results.jsonl", {"benchmark": "data_free"})
        compare_data_free(config, records, lambda text: None, said.append, cases)
    assert len(said) == len(records.rows) - 1 == 6 + 5
    assert all(0 <= row["test_top1"] <= 1 for row in records.rows)
    report = data_free_report(records.rows, cases)
    pruned, mixed = (line for line in report.splitlines() if line.startswith("| synthetic_net"))
    assert "50 % removed, 4 bits" in pruned and pruned.endswith("| 12.34 (56.78) |")
    assert "2 bits / 6 bits in turn" in mixed and mixed.endswith("| - |")
    assert "images" not in report.splitlines()[0] and "of 40 test images" in report


def test_images_are_for_the_comparison_only(tmp_path):
    config = parse_config({**VALUES, "data": {**VALUES["data"], "calibration": 16}}, "test.yaml")
    records = Records(tmp_path / "results.jsonl", {"benchmark": "data_free"})
    compare_data_free(config, records, lambda text: None, lambda text: None, (Case(0.5, (32, 32), {}),))
    assert "least_squares (images)" in data_free_report(records.rows, (Case(0.5, (32, 32), {}),))
