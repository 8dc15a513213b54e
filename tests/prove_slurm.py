"""The tests on a real Slurm, with ten signals at drawn moments. The last lines are a table, N of N."""

import argparse
import random
from pathlib import Path

from tests.proof import Proof


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    proof = Proof("prove-slurm", options.seed)
    tests = str(Path(__file__).parent / "slurm")
    proof.pytest(
        *("-n", "2", "--dist", "loadfile", tests), FAULT_SEED=str(options.seed), SLURM_DRAWS=str(options.signals)
    )
    proof.end()


if __name__ == "__main__":
    main()
