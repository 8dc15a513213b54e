"""The private parts of Hydra are there, and mean what they did in Hydra 1.3."""

import pytest
from hydra import compose, initialize
from hydra.core.utils import JobReturn, JobStatus
from hydra.utils import get_class

from syncbn.training.launch.hydra_internals import is_basic_sweeper
from syncbn.training.launch.sweep import _error


def test_the_default_sweeper_is_the_basic_one() -> None:
    with initialize(version_base=None, config_path=None):
        target = compose(return_hydra_config=True).hydra.sweeper._target_
    assert is_basic_sweeper(target)
    assert get_class(target).__name__ == "BasicSweeper"
    assert not is_basic_sweeper("a.Sweeper")


def test_the_error_of_a_failed_job_is_found_and_nothing_printed(capsys: pytest.CaptureFixture[str]) -> None:
    failed, done = JobReturn(overrides=["a=1"], status=JobStatus.FAILED), JobReturn(status=JobStatus.COMPLETED)
    failed.return_value = error = ValueError("no")
    done.return_value = 1
    assert _error(failed) is error
    assert _error(done) is None
    assert capsys.readouterr() == ("", "")
