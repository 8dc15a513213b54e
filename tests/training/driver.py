"""A process that runs ``train.py`` again and again, as asked on standard input: a JSON line a call.

As in a sweep, the ranks of all calls are forked from one server, so only the first call waits for imports.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from syncbn.training.identity import new_id

TRAIN = str(Path(__file__).resolve().parents[2] / "train.py")


def call(arguments: list[str], where: str) -> int:
    os.chdir(where)
    sys.argv = [TRAIN, *arguments]
    try:
        runpy.run_path(TRAIN, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        GlobalHydra.instance().clear()
        new_id.cache_clear()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        print(call(**json.loads(line)), file=answers, flush=True)
