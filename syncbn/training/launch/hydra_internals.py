"""The private parts of Hydra that syncbn needs; no other module uses them.

Each was read in the version ``TESTED``. ``tests/training/launch/test_hydra_internals.py`` fails when a later Hydra has
moved one.
"""

TESTED = "1.3.8"  # the newest Hydra that the tests have run with; the doctor reports a newer one


def is_basic_sweeper(target: str) -> bool:
    """Whether a sweeper's ``_target_`` is Hydra's default for ``-m``, which tries each combination once.

    ``hydra._internal.core_plugins.basic_sweeper.BasicSweeper``, Hydra 1.3. The public ``hydra.runtime.choices`` names
    the config group, even if ``hydra.sweeper._target_`` was overridden.
    """
    return target == "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
