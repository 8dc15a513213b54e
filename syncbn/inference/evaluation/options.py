"""The options of ``syncbn evaluate``."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from syncbn.inference.evaluation.data_sets import DataSet


class Options(NamedTuple):
    """The options of ``syncbn evaluate``."""

    data: Sequence[DataSet] = ()
    metrics: Sequence[str] = ()
    out: Path | None = None
    directory: Path | None = None
    config_dir: Path | None = None
    trust: bool = False
