"""Checks that a run id can name a directory, a W&B run and a setting of Hydra's command line."""

import os
import re

from syncbn.training.console import printable
from syncbn.training.errors import SettingError

# Characters that a directory, W&B, a glob and Hydra's command line all accept. File servers for Windows drop a dot at
# the end. Letters that the locale lacks are surrogates (PEP 383).
RUN_ID = r"[\w\udc80-\udcff]([\w\udc80-\udcff.+@ -]*[\w\udc80-\udcff+@-])?"


LONGEST = 255  # bytes in one name, on nearly every file system


def check_id(run_id: str | None) -> None:
    """Raises:
    SettingError: a directory or a W&B run cannot have this name.
    """
    if run_id is not None and not re.fullmatch(RUN_ID, run_id):
        raise SettingError(
            "run.id",
            printable(run_id),
            "use letters, digits, any of -_.+@, and blanks between them; no dot last, a letter or digit first",
        )
    if run_id is not None and len(os.fsencode(run_id)) > LONGEST:
        raise SettingError("run.id", f"{run_id[:20]}...", f"the name is too long; use at most {LONGEST} bytes")
