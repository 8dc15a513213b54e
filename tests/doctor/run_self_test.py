"""The self-test with an exercise of ``test_doctor.py``, or all checks: ``run_self_test.py EXERCISE TIMEOUT [OUTPUTS]``.

Prints the rows as JSON. It is called in a fork of a process that has imported torch, and its ranks are forks too.
"""

import multiprocessing
import sys
from multiprocessing import util
from pathlib import Path

import torch

from syncbn.doctor import examine, selftest, to_json
from tests.doctor import test_doctor
from tests.training.support.forking_driver import forked


def forked_rank(path: str, arguments: list[str], descriptors: list[int]) -> int:
    """Runs the code of a spawned rank in a fork: ``spawn_main`` asserts what its arguments are."""
    code = arguments[arguments.index("-c") + 1]
    return forked(path, [f"import sys; sys.argv = ['-c', '--multiprocessing-fork']; {code}"], descriptors)


if __name__ == "__main__":
    name, timeout, *outputs = sys.argv[1:]
    torch.cuda.is_available = lambda: False
    exercise: selftest.Exercise = getattr(test_doctor, name)
    selftest.selftest_ranks.start_tracker()
    util.spawnv_passfds = forked_rank
    before = set(multiprocessing.active_children())
    limit = float(timeout)
    rows = examine(Path(outputs[0]), limit, exercise) if outputs else selftest.run(limit, exercise)
    assert set(multiprocessing.active_children()) == before
    print(to_json(rows))
