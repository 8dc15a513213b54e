"""Follows the tutorials from their beginning to their end: writes each file, and types each command as it is written.

python -m tests.soak.docs                        # all of them, about ten minutes on two cores
python -m tests.soak.docs export preemption      # some
python -m tests.soak.docs --shortened            # with few batches and seeds
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.support.tutorial_pages import File
from tests.support.tutorial_reader import Reader
from tests.support.warm_process import REPO


def main() -> None:
    """Prints each command with its seconds, and exits with 1 if one fails or prints other lines than the page shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortened", action="store_true")
    parser.add_argument("pages", nargs="*", help="names of pages in docs/tutorials")
    asked = parser.parse_args()
    names = asked.pages or sorted(page.stem for page in (REPO / "docs/tutorials").glob("*.md"))
    failed = [name for name in names if not _follow(name, asked.shortened)]
    print(f"failed: {', '.join(failed)}" if failed else f"{len(names)} pages are right")
    sys.exit(bool(failed))


def _follow(name: str, shortened: bool) -> bool:
    print(f"{name}:")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        reader = Reader(REPO / f"docs/tutorials/{name}.md", Path(place), shortened)
        for step in reader.steps:
            before = time.monotonic()
            try:
                missing = reader.follow(step)
            except AssertionError as error:
                missing = [str(error)]
            what = step.path if isinstance(step, File) else " ".join(step.words)
            print(f"{time.monotonic() - before:7.1f} s  {what}", flush=True)
            if missing:
                print("\n".join(f"not printed: {line}" for line in missing))
                return False
    print(f"{time.monotonic() - begin:7.1f} s in all")
    return True


if __name__ == "__main__":
    main()
