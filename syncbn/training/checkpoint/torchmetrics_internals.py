"""The private parts of torchmetrics that syncbn needs; no other module uses them.

Each was read in the version ``TESTED``. ``tests/training/checkpoint/test_torchmetrics_internals.py`` fails, with the
name of the attribute, when a later torchmetrics has moved one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the doctor needs the version alone
    from torchmetrics import Metric

TESTED = "1.9.0"  # the newest torchmetrics that the tests have run with; the doctor reports a newer one


def set_update_count(metric: "Metric", count: int) -> None:
    """Sets how many updates a metric has seen.

    ``Metric._update_count``, torchmetrics 1.9. The public ``update_count`` cannot be set, and ``state_dict`` has no
    count. A metric whose count is 0 warns in ``compute``, and ``merge_state`` weights means by the count.
    """
    metric.update_count  # noqa: B018  # AttributeError where torchmetrics has renamed it
    metric._update_count = count


def forget_result(metric: "Metric") -> None:
    """Clears the cached result, so that the next ``compute`` computes from the states.

    ``Metric._computed``, torchmetrics 1.9. The public ``reset`` clears the states too.
    """
    metric._computed = None
