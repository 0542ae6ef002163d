"""The table of estimators: every one is trained from the same start, for every seed."""

from __future__ import annotations

import pytest

from secateur.envs.core import InputError
from secateur.envs.quantization.estimators import ESTIMATORS
from secateur.search.benchmarks import estimators
from secateur.search.benchmarks.records import Records


@pytest.fixture(scope="module")
def records(settings, problem, tmp_path_factory):
    records = Records(tmp_path_factory.mktemp("rows") / "rows.jsonl", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimators, "calibrated_problem", lambda config, status: problem)
        config = settings(finalize={"training": {"batch_size": 32, "learning_rate": 0.02}})
        compare = list(estimators.compare_estimators(config, ("W2A4",), 2, 2, records, lambda text: None))
        assert len(compare) == len(records.rows) == 1 + 2 * len(ESTIMATORS)
        again = list(estimators.compare_estimators(config, ("W2A4",), 2, 2, records, lambda text: None))
        assert not again, "rows that are there are not measured again"
    return records


def test_every_training_lowers_its_loss(records):
    for row in records.rows:
        if row["estimator"] != estimators.START:
            assert row["losses"][-1] < row["losses"][0], row["estimator"]


def test_the_report_has_means_and_spreads(records):
    lines = estimators.estimator_report(records.rows).splitlines()
    assert lines[0] == f"| bits | before training | {' | '.join(ESTIMATORS)} |"
    row = next(row for row in records.rows if row["estimator"] == estimators.START)
    scores = [100 * own["test_score"] for own in records.rows if own["estimator"] == "soft"]
    assert lines[2].startswith(f"| W2A4 | {100 * row['test_score']:.2f} |")
    assert f"| {sum(scores) / 2:.2f} ± {abs(scores[0] - scores[1]) / 2**0.5:.2f} |" in lines[2]
    assert "2 epochs, mean and standard deviation over 2 seeds" in lines[-1]


def test_bits_that_do_not_exist_are_one_sentence(settings, tmp_path):
    records = Records(tmp_path / "rows.jsonl", {})
    with pytest.raises(InputError, match="--bits must read like"):
        next(estimators.compare_estimators(settings(), ("2",), 1, 1, records, lambda text: None))
