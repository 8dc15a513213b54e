"""Tests the words, the unit and the direction of metrics."""

from pathlib import Path

import pytest

from syncbn.study.compare.runs import run_reader
from syncbn.study.compare.runs.metric import choose, shown
from tests.study.support.run_directories import run


@pytest.mark.parametrize(
    ("name", "value", "label", "unit", "better", "as_shown"),
    [
        ("test/acc", 0.9, "test error", "%", "lower", 10.0),
        ("test/acc_probe", 0.9, "test error of a linear probe", "%", "lower", 10.0),
        ("test/acc_nn", 0.9, "test error by nearest neighbours", "%", "lower", 10.0),
        ("test/acc_shard1", 0.9, "test error on shard1", "%", "lower", 10.0),
        ("test/miou", 0.4, "test mIoU", "%", "higher", 40.0),
        ("test/iou", 0.4, "test IoU", "%", "higher", 40.0),
        ("test/miou", 1.4, "test mIoU", "", "higher", 1.4),  # no share: somebody else's number
        ("test/loss", 0.4, "test loss", "", "lower", 0.4),
        ("leak/together", 0.7, "pretext accuracy with both views on one device", "", "higher", 0.7),
        ("leak/spread", 0.7, "pretext accuracy with the views spread", "", "higher", 0.7),
        ("leak/difference", 0.7, "leak", "", "lower", 0.7),
    ],
)
def test_a_metric_is_shown_in_its_words(
    tmp_path: Path, name: str, value: float, label: str, unit: str, better: str, as_shown: float
) -> None:
    (found,) = run_reader.read([run(tmp_path / "a", test={name: value})])
    metric = choose(name, [found])
    assert (metric.label, metric.unit, metric.better) == (label, unit, better)
    assert metric.difference_unit == ("points" if unit else "")
    assert (metric.least, metric.greatest) == ((0.0, 100.0) if unit else (metric.least, metric.greatest))
    assert shown(metric, found) == pytest.approx(as_shown)
