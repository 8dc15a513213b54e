"""The tests on a real Slurm whose nodes are network namespaces: links that are cut, ten signals at drawn moments.

The last lines are a table, N of N.
"""

import argparse
import random
from pathlib import Path

from tests.soak.counts import Proof


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    proof = Proof("prove-slurm", options.seed)
    tests = Path(__file__).parents[1] / "slurm"
    links = str(tests / "test_links.py")
    environment = {"SLURM_LONG": "1", "SLURM_DRAWS": str(options.signals), "FAULT_SEED": str(options.seed)}
    proof.pytest(links, **environment)  # alone: they share nodes with others
    proof.pytest("-n", "3", "--dist", "loadfile", str(tests), f"--ignore={links}", **environment)
    proof.end()


if __name__ == "__main__":
    main()
