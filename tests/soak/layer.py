"""``make prove-layer``: the property tests of the layer at length, on up to four ranks, from a new seed each time."""

import argparse
import secrets
import sys
import time
import warnings

from tests.nn.test_properties import hold
from tests.support.ranks import Ranks


def main() -> None:
    parser = argparse.ArgumentParser(prog="make prove-layer", description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="how many in all (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="on 1 to so many ranks (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of an earlier run, to repeat it")
    asked = parser.parse_args()
    warnings.simplefilter("error")  # here and on the ranks, as in the tests

    pool, held, start = Ranks(), {}, time.monotonic()
    try:
        for world_size in range(1, asked.ranks + 1):
            share = (asked.examples + world_size - 1) // asked.ranks  # shares add up, whatever the numbers
            held[world_size] = hold(pool, world_size, share, asked.seed) if share else 0
            print(f"P {world_size}: {held[world_size]} held, {time.monotonic() - start:.0f} s so far", flush=True)
    except BaseException:
        print(f"prove-layer: an example did not hold; to repeat it: --seed {asked.seed}", file=sys.stderr)
        raise
    finally:
        pool.close()
    each = ", ".join(f"P {world_size}: {count}" for world_size, count in held.items())
    total = sum(held.values())
    print(f"prove-layer: {total} of {total} examples held ({each}; seed {asked.seed})")


if __name__ == "__main__":
    main()
