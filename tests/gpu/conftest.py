import pytest
from syncbn.testing import interpreted


@pytest.fixture
def device():
    with interpreted():
        yield "cpu"
