"""Computes the divisors of a number and formats lists of numbers, for error messages."""


def divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def listed(numbers: list[int]) -> str:
    """The numbers separated by commas: ``1, 2, 4``."""
    return ", ".join(map(str, numbers))
