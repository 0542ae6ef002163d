"""The comparison of recoveries without images: its policies, and a run on the synthetic task."""

from secateur.search.benchmarks.data_free import CASES, Case, case_policy, compare_data_free, data_free_report
from secateur.search.benchmarks.records import Records
from secateur.search.config import parse_config

VALUES = {
    "model": {"factory": "secateur:synthetic", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "calibration": 0, "validation": 20, "test": 40},
    "recovery": ["least_squares"],
    "budgets": {"small": {"macs": "<= 50%"}},
}
MIXED = Case(0.0, (2, 6), {})


def bits_of(graph, case):
    return {layer.name: bits for layer, bits in zip(graph.geometry.layers, case_policy(graph, case).weight_bits, strict=True)}


def test_low_bits_are_inside_blocks_and_alternate_in_chains(resnet_graph, chain_graph):
    bits = bits_of(resnet_graph, MIXED)
    assert {name for name, b in bits.items() if b == 2} == {name for name in bits if name.endswith(".conv1")}
    assert set(bits.values()) == {2, 6} and MIXED.methods.keys() != CASES[0].methods.keys()
    assert list(bits_of(chain_graph, MIXED).values()) == [2, 6] * 7


def test_every_inner_group_loses_the_same_share(resnet_graph):
    case = Case(0.25, (4, 4), {})
    assert set(bits_of(resnet_graph, case).values()) == {4}
    for group, width in zip(resnet_graph.groups, case_policy(resnet_graph, case).widths, strict=True):
        inner = group.name.startswith("layer") and group.name.endswith(".conv1")
        assert width == (0.75 if inner else 1) * group.units


def test_rows_are_measured_once_and_need_no_images(tmp_path):
    config = parse_config(VALUES, "test.yaml")
    cases = (Case(0.5, (4, 4), {"synthetic": (12.34, 56.78)}), MIXED)
    for expected in (6 + 5, 0):
        records = Records(tmp_path / "results.jsonl", {"benchmark": "data_free"})
        assert len(list(compare_data_free(config, records, lambda text: None, cases))) == expected
    assert len(records.rows) == 1 + 6 + 5 and all(0 <= row["test_top1"] <= 1 for row in records.rows)
    report = data_free_report(records.rows, cases)
    pruned, mixed = (line for line in report.splitlines() if line.startswith("| synthetic "))
    assert "50 % removed, 4 bits" in pruned and pruned.endswith("| 12.34 (56.78) |")
    assert "2 bits / 6 bits in turn" in mixed and mixed.endswith("| - |")
    assert "images" not in report.splitlines()[0] and "of 40 test images" in report


def test_images_are_used_for_the_comparison_only(tmp_path):
    config = parse_config({**VALUES, "data": {**VALUES["data"], "calibration": 16}}, "test.yaml")
    records, case = Records(tmp_path / "results.jsonl", {"benchmark": "data_free"}), Case(0.5, (32, 32), {})
    lines = list(compare_data_free(config, records, lambda text: None, (case,)))
    assert [line for line in lines if "images" in line] == lines[-1:]
    assert "least_squares (images)" in data_free_report(records.rows, (case,))
