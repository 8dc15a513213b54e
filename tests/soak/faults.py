"""Kills runs at random moments, resumes them, and compares them bit by bit with runs that nobody killed.

Each draw kills everything with SIGKILL, and every other one the resumed run as well. Then runs are stopped in each way
that reaches all processes, at each moment, and resumed. Then the faults of ``tests/training/launch/test_faults.py`` are
run, each several times. The last lines are a table, fault by fault, N of N.
"""

import argparse
import itertools
import random
import tempfile
import time
from pathlib import Path

from tests.soak.counts import Proof
from tests.training.support.faulty_runs import MOMENTS, STOPS, WHERE, Draw, differences, draw, fault, faulty, stopped
from tests.training.support.train_command import Run

FAULTS = Path(__file__).parents[1] / "training" / "launch" / "test_faults.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=1, help="how often each stop is tried at each moment")
    parser.add_argument("--faults", type=int, default=2, help="how often each other fault is tried")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    options = parser.parse_args()
    proof = Proof("prove-faults", options.seed)
    with tempfile.TemporaryDirectory() as place:
        straight = {}
        for ranks in (1, 2):
            start = time.monotonic()
            straight[ranks] = faulty(_new(Path(place)), *_same(2, ranks), fresh=True)
            seconds = time.monotonic() - start
        _kills(Path(place), options.kills, random.Random(options.seed), proof, straight)
        _stops(Path(place), options.stops, random.Random(options.seed), proof, straight[2], 0.7 * seconds)
    for _ in range(options.faults):
        proof.pytest(str(FAULTS))
    proof.end()


def _stops(place: Path, times: int, source: random.Random, proof: Proof, straight: Run, latest: float) -> None:
    """Stops at the start come up to ``latest`` seconds after it, while the run is under way."""
    for what, moment in times * list(itertools.product(STOPS, MOMENTS)):
        there, delay = _new(place), source.uniform(0, latest)
        same = ["trainer.devices=2", "data.global_batch_size=64"]
        _, found = stopped(there, what, moment, *same, delay=delay)
        again = faulty(there, "run.id=a", "data.num_workers=1", *same)
        found += [f"exit code {again.code}: {again.err}"] if again.code else differences(straight, again)
        proof.note(f"{what.replace('_', ' ')} at {moment}, resumed: bitwise the same", not found)
        print(f"     {what} at {moment}, {delay:.1f} s: {'; '.join(found) or 'bitwise the same'}", flush=True)


def _kills(place: Path, kills: int, source: random.Random, proof: Proof, straight: dict[int, Run]) -> None:
    for number in range(kills):
        where = WHERE[number % len(WHERE)]
        first = draw(source, where, workers=source.choice([0, 2]), ranks=source.choice([1, 2]))
        second = draw(source, source.choice(WHERE[1:]), first.workers, first.ranks) if number % 2 else None
        found = _kill(_new(place), first, second, straight[first.ranks])
        proof.note(f"SIGKILL to everything at {where}, resumed: bitwise the same", not found)
        again = f"; and again at {second.at}" if second else ""
        print(f"{number + 1:>3}  {where}: {first}{again}: {'; '.join(found) or 'bitwise the same'}", flush=True)


def _kill(place: Path, first: Draw, second: Draw | None, straight: object) -> list[str]:
    same = [*_same(first.workers, first.ranks), f"resume.every_n_steps={first.every_n_steps}"]
    for number, at in enumerate(filter(None, (first, second))):
        (place / str(number)).mkdir()
        run = faulty(place, *same, fault(place / str(number), "kill_everything", **at.at), fresh=True)
        if run.code == 0:  # a moment by the clock, or a hook of an epoch that was over before, has not come
            return differences(straight, run)  # type: ignore[arg-type]
        if run.code != -9 or run.left:
            return [f"ended with {run.code}, left {run.left}: {run.err}"]
    run = faulty(place, *same, fresh=True)
    return [f"exit code {run.code}: {run.err}"] if run.code else differences(straight, run)  # type: ignore[arg-type]


def _same(workers: int, ranks: int) -> list[str]:
    devices = [f"trainer.devices={ranks}", "data.global_batch_size=64"]
    return ["run.id=a", f"data.num_workers={workers}", *devices]


def _new(place: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=place))


if __name__ == "__main__":
    main()
