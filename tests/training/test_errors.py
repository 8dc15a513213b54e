"""How an error of a setting is printed, and what it holds."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.read_file import DamagedError, read_json
from tests.support.refuses import refuses


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (4, "trainer.devices=4: there are 2 GPUs; use at most 2"),
        ("many", "trainer.devices=many: there are 2 GPUs; use at most 2"),
        (None, "trainer.devices=null: there are 2 GPUs; use at most 2"),
        (True, "trainer.devices=true: there are 2 GPUs; use at most 2"),
        ([1, 2], "trainer.devices=[1, 2]: there are 2 GPUs; use at most 2"),
    ],
)
def test_an_error_is_printed_as_the_setting_was_typed(value: Any, line: str) -> None:
    error = SettingError("trainer.devices", value, "there are 2 GPUs; use at most 2")
    assert str(error) == line
    assert (error.setting, error.value, error.hint) == ("trainer.devices", value, "there are 2 GPUs; use at most 2")


def test_a_value_or_a_hint_may_be_left_out() -> None:
    assert str(SettingError("trainer.logger", hint="drop it")) == "trainer.logger: drop it"
    assert str(SettingError("a sentence of a user's own class")) == "a sentence of a user's own class"


def test_the_fields_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(AgreedError("seed", -1, "use 0 or more")))
    assert (type(error), str(error)) == (AgreedError, "seed=-1: use 0 or more")
    assert (error.setting, error.value, error.hint) == ("seed", -1, "use 0 or more")


def test_an_error_that_all_ranks_raise_keeps_the_line_and_the_fields() -> None:
    for error in (SettingError("run.id", None, "use a name"), SettingError("-m", hint="leave it out")):
        agreed = error.agreed()
        assert (type(agreed), str(agreed)) == (AgreedError, str(error))
        assert vars(agreed) == vars(error)


def test_a_damaged_file_is_named_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.touch()
    with refuses(str(path), None, "is damaged (empty)", kind=DamagedError):
        read_json(path)
    error = pickle.loads(pickle.dumps(DamagedError(path, "is damaged (empty)")))
    assert (type(error), str(error)) == (DamagedError, f"{path} is damaged (empty)")
    assert (error.setting, error.hint) == (str(path), "is damaged (empty)")


def test_a_refusal_with_another_field_fails_the_test() -> None:
    with refuses("seed", -1, "0 or more"):
        raise SettingError("seed", -1, "use 0 or more")
    for setting, value, word in (("data", -1, ""), ("seed", 1, ""), ("seed", -1, "at most")):
        with pytest.raises(AssertionError), refuses(setting, value, word):
            raise SettingError("seed", -1, "use 0 or more")
    with pytest.raises(pytest.fail.Exception), refuses("seed"):
        pass
