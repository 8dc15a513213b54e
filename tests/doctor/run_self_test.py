"""The self-test with an exercise of ``test_doctor.py``, or all checks: ``run_self_test.py EXERCISE TIMEOUT [OUTPUTS]``.

Prints the rows as JSON. In a warm process its ranks are forks too.
"""

import multiprocessing
import sys
from pathlib import Path

import torch

from syncbn.doctor import examine, selftest, to_json
from tests.doctor import test_doctor

if __name__ == "__main__":
    name, timeout, *outputs = sys.argv[1:]
    torch.cuda.is_available = lambda: False
    exercise: selftest.Exercise = getattr(test_doctor, name)
    selftest.selftest_ranks.start_tracker()
    before = set(multiprocessing.active_children())
    limit = float(timeout)
    rows = examine(Path(outputs[0]), limit, exercise) if outputs else selftest.run(limit, exercise)
    assert set(multiprocessing.active_children()) == before
    print(to_json(rows))
