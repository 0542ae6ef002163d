"""The table of recoveries: the right groups are pruned, the scores are those of the test split, finished rows stay."""

import pytest
import torch
from torchvision.models import mobilenet_v2, squeezenet1_0

from secateur.envs.evaluator import top1
from secateur.envs.model_graph import analyze
from secateur.envs.tasks.cifar_resnet import resnet20, vgg16_bn
from secateur.search.benchmarks import recoveries
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recoveries import Variant, compare_recoveries, inner_groups, recovery_report, uniform_policy

VARIANTS = (
    Variant("dense"),
    Variant("pruned", pruned=True),
    Variant("refitted", pruned=True, recoveries=("least_squares", "batch_norm")),
    Variant("W2A8", bits=(2, 8)),
)


def inner_names(network, size):
    graph = analyze(network.eval(), (torch.zeros(1, 3, size, size),))
    return [group.name for group, inner in zip(graph.groups, inner_groups(graph), strict=True) if inner], graph


def test_inner_groups_are_made_by_one_layer():
    names, graph = inner_names(resnet20(), 32)
    assert names == [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    names, graph = inner_names(vgg16_bn(), 32)
    assert len(names) == len(graph.groups) == 13
    names, graph = inner_names(squeezenet1_0(), 64)
    assert len(names) == len(graph.groups) == 25


def test_depthwise_followers_do_not_make_a_group_residual():
    names, graph = inner_names(mobilenet_v2(), 64)
    assert "features.2.conv.0.0" in names  # an expansion and its depthwise convolution
    assert "features.0.0" in names  # the stem and the first depthwise convolution
    producers = {group.name: group.producers for group in graph.groups}
    assert len(producers["features.2.conv.0.0"]) == 2
    assert "features.2.conv.2" not in names and len(producers["features.2.conv.2"]) == 2  # a residual stream


def test_policies_prune_inner_groups_and_quantize_all_layers(problem):
    pruned = uniform_policy(problem.graph, Variant("p", pruned=True), 0.3)
    # The stream of 8 stays; 8 and 16 channels lose 30 %.
    assert dict(zip((group.name for group in problem.graph.groups), pruned.widths, strict=True)) == {
        "conv1": 8, "conv2": 6, "conv4": 11
    }  # fmt: skip
    assert set(pruned.weight_bits) == set(pruned.activation_bits) == {32}
    quantized = uniform_policy(problem.graph, Variant("q", bits=(4, 8)), 0.3)
    assert quantized.widths == (8, 8, 16) and set(quantized.weight_bits) == {4} and set(quantized.activation_bits) == {8}
    assert uniform_policy(problem.graph, Variant("p", pruned=True), 0.95).widths == (8, 1, 1)
    left = uniform_policy(problem.graph, Variant("q", bits=(4, 8)), 0.3, exclude=["conv*"])
    assert left.weight_bits == (32, 32, 32, 32, 4) and left.activation_bits == (32, 32, 32, 32, 8)


def test_every_variant_is_scored_on_the_test_split(problem, settings, tmp_path, lines):
    records = Records(tmp_path / "rows.jsonl", {})
    compare_recoveries([settings()], 0.75, records, lambda text: None, lines.append, VARIANTS)
    rows = {row["variant"]: row for row in records.rows}
    test = problem.data.tensors(problem.data.test)
    assert list(rows) == ["dense", "pruned", "refitted", "W2A8"] and len(lines) == 4
    assert rows["dense"]["test_top1"] == top1(problem.assembler.model, *test) and rows["dense"]["images"] == len(test[1])
    assert rows["refitted"]["test_top1"] > rows["pruned"]["test_top1"]
    assert rows["W2A8"]["test_top1"] != rows["dense"]["test_top1"] and rows["W2A8"]["shares"]["weight_bytes"] < 0.25
    assert rows["pruned"]["shares"]["macs"] == rows["refitted"]["shares"]["macs"] < 0.5


def test_finished_rows_are_not_measured_again(settings, tmp_path, lines, monkeypatch):
    file = tmp_path / "rows.jsonl"
    compare_recoveries([settings()], 0.5, Records(file, {}), lines.append, lines.append, VARIANTS[:2])
    measured = []
    original = recoveries._measure
    monkeypatch.setattr(recoveries, "_measure", lambda *arguments: measured.append(arguments[1].name) or original(*arguments))
    compare_recoveries([settings()], 0.5, Records(file, {}), lines.append, lines.append, VARIANTS[:3])
    assert measured == ["refitted"]
    monkeypatch.setattr(recoveries, "calibrated_problem", None)  # nothing is built when all is there
    compare_recoveries([settings()], 0.5, Records(file, {}), lines.append, lines.append, VARIANTS[:3])
    assert lines[-1] == "synthetic_net: measured already"


def test_the_table_has_a_line_per_network_and_dashes_for_what_is_missing():
    def row(network, variant, top1, macs=1.0):
        shares = {"macs": macs, "weight_bytes": 1.0}
        return {"network": network, "ratio": 0.5, "config": {}, "variant": variant, "test_top1": top1, "images": 100,
                "shares": shares, "data": f"{network} data."}  # fmt: skip

    rows = [row("a", "dense", 0.9), row("a", "pruned", 0.75, 0.501), row("b", "dense", 0.5)]
    report = recovery_report(rows, VARIANTS).splitlines()
    assert report[0] == "| network | removed % | MACs left % | dense | pruned | refitted | W2A8 |"
    assert report[2] == "| a | 50 | 50.1 | 90.00 | 75.00 | - | - |"
    assert report[3] == "| b | 50 | - | 50.00 | - | - | - |"
    assert "- b: 100 test images, standard error 5.00 points at 50.0 %. b data." in report


def test_the_columns_name_plugins_that_exist():
    from secateur.envs.quantization.quantizers import QUANTIZERS
    from secateur.envs.recovery import RECOVERIES

    for variant in recoveries.VARIANTS:
        assert variant.quantizer in QUANTIZERS and set(variant.recoveries) <= set(RECOVERIES)
    assert len({variant.name for variant in recoveries.VARIANTS}) == len(recoveries.VARIANTS)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_ratio_of_nothing_is_the_dense_network(problem, ratio):
    row = recoveries._measure(problem, Variant("pruned", pruned=True), ratio)
    assert (row["shares"]["macs"] == 1) == (ratio == 0)
