"""The table of quantizers: methods in lines, bit-widths in columns."""

from secateur.search.benchmarks import quantizers, recoveries
from secateur.search.benchmarks.records import Records


def test_every_method_is_measured_at_every_bit_width(settings, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizers, "METHODS", (("uniform", ()), ("gptq", ("sequential",))))
    monkeypatch.setattr(recoveries, "calibrated_problem", lambda config, status: problem)
    records = Records(tmp_path / "rows.jsonl", {})
    assert len(list(quantizers.compare_quantizers(settings(), records, lambda text: None))) == len(records.rows) == 7
    rows = {row["variant"]: row for row in records.rows}
    sizes = [rows[name]["shares"]["weight_bytes"] for name in ("dense", "uniform, 4 bits", "uniform, 2 bits")]
    assert sizes[0] == 1 > sizes[1] > sizes[2]
    lines = quantizers.quantizer_report(records.rows).splitlines()
    assert lines[0] == "| quantizer, recoveries | 4 bits | 3 bits | 2 bits |"
    scores = [f"{100 * rows[f'gptq + sequential, {bits} bits']['test_top1']:.2f}" for bits in (4, 3, 2)]
    assert lines[3] == f"| gptq + sequential | {' | '.join(scores)} |"
    left = quantizers.quantizer_report([rows["dense"], rows["uniform, 4 bits"]]).splitlines()
    assert left[2].endswith(" | - | - |") and left[3] == "| gptq + sequential | - | - | - |"
