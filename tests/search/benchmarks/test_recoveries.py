"""The table of recoveries: scores are those of the test split, finished rows stay."""

import pytest

from secateur.search.benchmarks import recoveries
from secateur.search.benchmarks.policies import uniform_policy
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recoveries import Variant, compare_recoveries, recovery_report
from secateur.search.benchmarks.recovery_settings import with_recoveries
from tests.scoring import top1

VARIANTS = (
    Variant("dense"),
    Variant("pruned", pruned=True),
    Variant("repaired", pruned=True, recoveries=("least_squares", "batch_norm")),
    Variant("W2A8", bits=(2, 8)),
)
RATIO = 0.75


@pytest.fixture
def compare(settings, problem, tmp_path, monkeypatch):
    """Function (variants) -> (lines, rows, texts of the status), on one file and the shared problem."""
    monkeypatch.setattr(recoveries, "calibrated_problem", lambda config, status: problem)

    def run(variants):
        records, statuses = Records(tmp_path / "rows.jsonl", {}), []
        lines = list(compare_recoveries([settings()], RATIO, records, statuses.append, variants))
        return lines, records.rows, statuses

    return run


def test_every_variant_is_scored_on_the_test_split(compare, problem):
    lines, rows, _ = compare(VARIANTS)
    dense, pruned, repaired, quantized = rows
    test = problem.task.data.tensors(problem.task.data.test)
    assert [row["variant"] for row in rows] == ["dense", "pruned", "repaired", "W2A8"] and len(lines) == 4
    assert dense["test_score"] == top1(problem.assembler.model, *test) and dense["images"] == len(test[1])
    for row, variant in ((repaired, VARIANTS[2]), (quantized, VARIANTS[3])):
        policy = uniform_policy(problem.graph, RATIO if variant.pruned else 0.0, variant.bits)
        network = with_recoveries(problem.assembler, variant.recoveries).assemble(policy)
        assert row["test_score"] == top1(network, *test)
    assert quantized["shares"]["weight_bytes"] < 0.25 and quantized["shares"]["macs"] == 1
    assert pruned["shares"]["macs"] == repaired["shares"]["macs"] < 0.5


def test_finished_rows_are_not_measured_again(compare):
    first, _, _ = compare(VARIANTS[:1])
    second, rows, _ = compare(VARIANTS[:2])
    assert [line.split(":")[0] for line in first + second] == ["synthetic, dense", "synthetic, pruned"]
    third, again, statuses = compare(VARIANTS[:2])
    assert (third, again, statuses) == ([], rows, ["synthetic: measured already"])


def test_the_table_has_a_line_per_network_and_dashes_for_what_is_missing():
    def row(network, variant, top1, macs=1.0):
        shares = {"macs": macs, "weight_bytes": 1.0}
        return {"network": network, "ratio": 0.5, "config": {}, "variant": variant, "test_score": top1, "images": 100,
                "shares": shares, "data": f"{network} data."}  # fmt: skip

    rows = [row("a", "dense", 0.9), row("a", "pruned", 0.75, 0.501), row("b", "dense", 0.5)]
    report = recovery_report(rows, VARIANTS).splitlines()
    assert report[0] == "| network | removed % | MACs left % | dense | pruned | repaired | W2A8 |"
    assert report[2] == "| a | 50 | 50.1 | 90.00 | 75.00 | - | - |"
    assert report[3] == "| b | 50 | - | 50.00 | - | - | - |"
    assert "- b: 100 test images, standard error 5.00 points at 50.0 %. b data." in report


def test_the_columns_name_plugins_that_exist():
    from secateur.envs.quantization.quantizers import QUANTIZERS
    from secateur.envs.recovery import RECOVERIES

    for variant in recoveries.VARIANTS:
        assert variant.quantizer.name in QUANTIZERS and set(variant.recoveries) <= set(RECOVERIES)
    assert len({variant.name for variant in recoveries.VARIANTS}) == len(recoveries.VARIANTS)


def test_scores_have_the_unit_of_their_metric():
    row = {"network": "a", "ratio": 0.5, "config": {}, "variant": "dense", "test_score": 31.25, "images": 100, "data": "Data."}
    row |= {"shares": {"macs": 1.0, "weight_bytes": 1.0}, "metric": {"name": "psnr", "unit": "dB"}}
    report = recovery_report([row], VARIANTS)
    assert "| a | 50 | - | 31.25 | - | - | - |" in report and "(PSNR dB)" in report and "- a: 100 test images. Data." in report


def test_a_ratio_of_zero_prunes_nothing(problem):
    row = recoveries.measure_variant(problem, Variant("pruned", pruned=True), 0.0)
    assert row["shares"] == {"macs": 1, "weight_bytes": 1}
