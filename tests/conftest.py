"""What all tests share."""

from collections.abc import Iterator

import pytest

from tests.harness import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool of ranks: ``ranks.run(fn, *args, world_size=2)``."""
    pool = Ranks()
    yield pool
    pool.close()
