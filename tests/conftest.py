"""What all tests share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.ranks import Ranks

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The pool of ranks: ``ranks.run(fn, *args, world_size=2)``."""
    pool = Ranks()
    yield pool
    pool.close()
