"""Tests expected figures in their three forms."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.study.compare import reference_spec
from syncbn.training.config.plan import Plan
from tests.support.refuses import refuses

CFG = OmegaConf.create(
    {
        "data": {"batch_size": 2, "global_batch_size": 32},
        "norm": {"name": "local"},
        "trainer": {"accelerator": "gpu", "devices": 8, "num_nodes": 2},
    }
)
SAID = {"what": "test error, %", "source": "a paper"}


def test_a_figure_is_of_one_side_and_the_settings_that_it_names() -> None:
    where = {"data.batch_size": 2, "devices": 16}
    (found,) = reference_spec.parse([{**SAID, "side": "local", "where": where, "value": 34.7, "tolerance": 0.6}])
    assert found.is_of("local", Plan.of(CFG, Path("a")))
    assert not found.is_of("sync", Plan.of(CFG, Path("a")))
    for name, value in {"data.batch_size": 4, "trainer.num_nodes": 1}.items():
        other = CFG.copy()
        OmegaConf.update(other, name, value)
        assert not found.is_of("local", Plan.of(other, Path("a")))


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"value": 24.0, "tolerance": 0.3}, "test error, %: 24 +- 0.3 (a paper)"),
        ({"value": 24.1}, "test error, %: 24.1 (a paper)"),
        ({"baseline": "local", "difference": -10.6, "tolerance": 0.9}, "test error, %: -10.6 +- 0.9 (a paper)"),
        ({"baseline": "local", "at_most": 1.25}, "test error, %: at most 1.25 (a paper)"),
    ],
)
def test_each_form_in_words(entry: dict[str, Any], line: str) -> None:
    (found,) = reference_spec.parse([{**SAID, "side": 8, **entry}])
    assert str(found) == line
    assert found.is_of("8", Plan.of(CFG, Path("a")))


@pytest.mark.parametrize(
    "entry",
    [
        {"value": 1.0},
        {"side": 8},
        {"side": 8, "value": 1.0, "difference": 1.0, "baseline": "local"},
        {"side": 8, "difference": 1.0},
        {"side": 8, "at_most": 1.0},
    ],
)
def test_no_form_and_two_forms_are_refused(entry: dict[str, Any]) -> None:
    form = "give side with value, or side and baseline with either difference or at_most"
    with refuses("expected: test error, %", None, form):
        reference_spec.parse([{**SAID, **entry}])


def test_another_key_is_refused_by_name() -> None:
    with refuses("expected: valeu", None, "there is no such key; use at_most, baseline, difference, metric, "):
        reference_spec.parse([{**SAID, "side": 8, "valeu": 1.0}])
