"""The table of quantizers: methods in lines, bit-widths in columns."""

import pytest

from secateur.envs.core import InputError
from secateur.search.benchmarks import quantizers, recoveries
from secateur.search.benchmarks.records import Records

METHODS = ("uniform", "gptq + sequential", "uniform activations=max")


def test_every_method_is_measured_at_every_bit_width(settings, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(recoveries, "calibrated_problem", lambda config, status: problem)
    records = Records(tmp_path / "rows.jsonl", {})
    chosen = quantizers.variants(METHODS, ("W4", "W2", "W8A2"))
    assert len(list(quantizers.compare_quantizers(settings(), records, lambda text: None, chosen))) == len(records.rows) == 10
    rows = {row["variant"]: row for row in records.rows}
    sizes = [rows[name]["shares"]["weight_bytes"] for name in ("dense", "uniform, 4 bits", "uniform, 2 bits")]
    assert sizes[0] == 1 > sizes[1] > sizes[2]
    # Options reach the quantizer: they concern inputs only.
    assert rows["uniform, 4 bits"]["test_score"] == rows["uniform activations=max, 4 bits"]["test_score"]
    assert rows["uniform, W8A2"]["test_score"] != rows["uniform activations=max, W8A2"]["test_score"]
    lines = quantizers.quantizer_report(records.rows).splitlines()
    assert lines[0] == "| quantizer, recoveries | 4 bits | 2 bits | W8A2 |"
    scores = [f"{100 * rows[f'gptq + sequential, {bits}']['test_score']:.2f}" for bits in ("4 bits", "2 bits", "W8A2")]
    assert lines[3] == f"| gptq + sequential | {' | '.join(scores)} |"
    assert "Test top-1 % of" in lines[-1] and "the inputs of these layers too" in lines[-1]
    left = quantizers.quantizer_report([rows[name] for name in ("dense", "uniform, 4 bits", "gptq + sequential, 2 bits")])
    assert left.splitlines()[3] == f"| gptq + sequential | - | {scores[1]} |" and "inputs stay in float" in left


def test_scores_have_the_unit_of_their_metric():
    metric = {"name": "psnr", "unit": "dB"}
    rows = [
        {"variant": name, "test_score": score, "metric": metric, "images": 5, "data": "Made up."}
        for name, score in (("dense", 31.5), ("uniform, W4A8", 30.25))
    ]
    report = quantizers.quantizer_report(rows)
    assert "| uniform | 30.25 |" in report and "Test PSNR dB of 5 images, dense 31.50." in report


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unifrom", "Did you mean `uniform`"),
        ("uniform clip=middle", "middle"),
        ("uniform max", "max has no value"),
        ("uniform + sequental", "Did you mean `sequential`"),
        ("", "unknown name"),
    ],
)
def test_a_method_that_does_not_exist_is_one_sentence(text, reason):
    with pytest.raises(InputError, match="--method must read like") as error:
        quantizers.parse_method(text)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["4", "W1", "W4A9", "A8", "W4A8B2"])
def test_bits_that_do_not_exist_are_one_sentence(text):
    with pytest.raises(InputError, match=f"--bits must read like W4 or W4A8, but got '{text}'"):
        quantizers.parse_bits(text)
