"""``make prove-exchange``: a million messages through shared memory, and ranks killed or stopped at random moments.

The ranks send messages of drawn sizes, now and then after a drawn sleep, and compare each sum with the one that they
compute themselves. Then one rank of three is killed, stopped, or stopped for a while, at a random moment: the others
must end in time with an error that names it, or, where it was stopped for a while only, must notice nothing.
"""

import argparse
import random
import time

from tests.nn.support.exchange import FAULTS, exchange, strike
from tests.soak.counts import Proof
from tests.support.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(prog="make prove-exchange", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="in all (default: %(default)s)")
    parser.add_argument("--faults", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    proof, pool, start = Proof("prove-exchange", options.seed), Ranks(), time.monotonic()
    try:
        for ranks, share in ((2, 0.6), (4, 0.3), (8, 0.1)):
            count = int(options.messages * share)
            held = min(pool.run(exchange, count, options.seed, world_size=ranks, timeout=7200, fresh=True))
            proof.note(f"{count:,} messages on {ranks} ranks: every sum right", held == count)
            print(f"{count:,} messages on {ranks} ranks, {time.monotonic() - start:.0f} s so far", flush=True)
        source = random.Random(options.seed)
        for number in range(options.faults):
            fault = list(FAULTS)[number % len(FAULTS)]
            wrong = strike(pool, fault, source.randrange(3), source.uniform(0.05, 0.6))
            proof.note(f"a rank is {fault}: " + ("nobody notices" if "while" in fault else "named in time"), not wrong)
            if wrong:
                print(f"{number}: a rank is {fault}: {wrong}", flush=True)
    finally:
        pool.close()
    proof.end()


if __name__ == "__main__":
    main()
