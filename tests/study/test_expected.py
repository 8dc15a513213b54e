"""What a part of a study says of figures to come."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.study import expected
from syncbn.training.schema import SettingError

SAID = {"what": "test error, %", "source": "a paper"}


def part(**entry: Any) -> dict[str, Any]:
    return {"sides": {"local": [], 8: []}, "expected": [{**SAID, **entry}]}


def test_a_value_is_of_one_side_and_the_settings_that_it_names() -> None:
    (found,) = expected.of("one", part(side="local", where={"data.batch_size": 2}, value=34.7, tolerance=0.6))
    two, four = (OmegaConf.create({"data": {"batch_size": size}}) for size in (2, 4))
    assert found.is_of("local", two)
    assert not found.is_of("local", four)
    assert not found.is_of("8", two)
    assert str(found) == "test error, %: 34.7 +- 0.6 (a paper)"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"side": 8, "value": 24.0}, "test error, %: 24 (a paper)"),
        (
            {"side": 8, "baseline": "local", "difference": -10.6, "tolerance": 0.9},
            "test error, %, minus that of local: -10.6 +- 0.9 (a paper)",
        ),
        (
            {"side": 8, "baseline": "local", "at_most": 1.25},
            "test error, %, over that of local: at most 1.25 (a paper)",
        ),
        ({"what": "8 is best"}, "8 is best (a paper)"),
    ],
)
def test_each_form_in_words(entry: dict[str, Any], line: str) -> None:
    (found,) = expected.of("one", part(**entry))
    assert str(found) == line
    assert found.is_of("8", OmegaConf.create()) == ("side" in entry)


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"side": "sync", "value": 1.0},
            r"^study.parts.one.expected\[0\].side=sync: use one of the part's sides, local",
        ),
        ({"side": 8, "baseline": "x", "difference": 1.0}, r"\.baseline=x: use one of the part's sides, local, 8$"),
        ({"side": 8, "valeu": 1.0}, r"what, source, side, valeu: use what and source, and of side, where, value, "),
        ({"value": 1.0}, "use value, or baseline and difference"),
        ({"side": 8, "value": 1.0, "difference": 1.0, "baseline": "local"}, "use value, or baseline and difference"),
        ({"side": 8, "difference": 1.0}, "use value, or baseline and difference"),
        ({"side": 8, "value": 1.0, "baseline": "local"}, "use value, or baseline and difference"),
    ],
)
def test_nonsense_is_refused_by_name(entry: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError, match=line):
        expected.of("one", part(**entry))
