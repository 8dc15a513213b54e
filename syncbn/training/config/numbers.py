"""Numbers for messages: the divisors of one, and a list of them."""


def divisors(number: int) -> list[int]:
    """All that divide it, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def listed(numbers: list[int]) -> str:
    """As ``1, 2, 4``."""
    return ", ".join(map(str, numbers))
