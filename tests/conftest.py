"""What all tests share."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support import warm_process
from tests.support.ranks import Ranks

gc.disable()  # until all tests are collected

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


def pytest_configure(config: pytest.Config) -> None:
    """One server for all processes of pytest-xdist: its imports take as long as several tests."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[warm_process.SHARED] = warm_process.start()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool of ranks: ``ranks.run(fn, *args, world_size=2)``."""
    pool = Ranks()
    yield pool
    pool.close()


# Files run as a whole, several at a time. One of these that began last would be left over, alone, at the end.
LONGEST = (
    *("test_run_dirs.py", "test_nine_claims.py", "test_faults.py", "test_runner.py", "test_simulated_devices.py"),
    *("test_resume_points.py", "test_wandb_logger.py", "test_files_lost.py", "test_sweep.py", "test_validate.py"),
    *("test_train.py", "test_compile.py", "test_ckpt_path.py", "test_tested_weights.py", "test_doctor.py"),
    *("test_signals.py", "test_statistics_monitor.py", "test_resume_foreign_modules.py", "test_record.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Imported modules and collected tests stay, so garbage collection skips them: each would take half a second."""
    gc.freeze()
    gc.enable()
