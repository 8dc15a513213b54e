import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import syncbn


@pytest.mark.parametrize(
    ("size", "plan"),
    [(64, ("world", None)), (32, (2, None)), (16, (1, None)), (8, (1, 8)), (1, (1, 1))],
)
def test_a_size_picks_a_group_or_ghost_batches(size: int, plan: tuple[object, object]) -> None:
    assert syncbn.normalization_batch(size, 16, 4) == plan


@pytest.mark.parametrize("size", [48, 3, 0, -16, 128, 17])
def test_a_size_that_cannot_be_is_refused_with_those_that_can(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={size} samples .* sizes that work: 1, 2, 4, 8, 16, 32, 64$"):
        syncbn.normalization_batch(size, 16, 4)


@given(st.integers(-2, 200), st.integers(1, 20), st.integers(1, 8))
def test_what_is_picked_shares_as_many_samples_as_was_asked(size: int, device_batch: int, world: int) -> None:
    try:
        group, ghost = syncbn.normalization_batch(size, device_batch, world)
    except ValueError as error:
        works = [int(n) for n in re.findall(r"\d+", str(error).split("work: ")[1])]
        assert size not in works
        for other in works:
            syncbn.normalization_batch(other, device_batch, world)
        return
    ranks = world if group == "world" else group
    assert world % ranks == 0
    assert (ghost or ranks * device_batch) == size
    assert ghost is None or device_batch % ghost == 0
