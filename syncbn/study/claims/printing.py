"""Findings as lines, for the terminal."""

from collections.abc import Iterator, Sequence

from syncbn.study.claims.result import Finding


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Each claim with the verdict of each norm; then sync against local; then what casts doubt."""
    width = max((len(each.text) for each in findings), default=0)
    for each in findings:
        yield f"{each.number} {each.text:{width}}   " + "   ".join(f"{s}: {each.verdicts[s]}" for s in each.sides)
    for each in findings:
        yield from (f"{each.number} {each.text}: {sentence}" for sentence in [*each.worse, *each.better])
    for each in findings:
        yield from (f"! {each.study}: {problem}" for problem in each.problems)
