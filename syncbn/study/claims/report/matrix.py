"""The first matrix of the page: a symbol and a few words for each claim and norm, and the sentence that sums it up."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from syncbn.study.claims.result import Finding, Row, Versus
from syncbn.study.claims.verdict import BETTER, FAILS, HOLDS, MEASURED, NOT_ASKED, NOT_RUN, SAME, WORSE
from syncbn.study.format import MISSING, listed, plural

HELD, PARTLY, FAILED, UNKNOWN, UNTESTED, EQUAL = "✓", "◐", "✗", "?", MISSING, "="  # symbols that differ without colour
TONES = {HELD: "better", PARTLY: "partly", FAILED: "worse", UNKNOWN: "open", UNTESTED: "unused", EQUAL: "even"}
LEGEND = (
    f"✓ holds, ◐ holds in part, ✗ fails, ? undecided (too few seeds to tell), {UNTESTED} not tested."
    " In the last column: ✓ sync is better than local, ✗ worse, ◐ both, = no difference."
)
MOST_WORDS = 6  # in a cell
SHARING = "sharing pays"  # head of the column on sync against local
IN_WORDS = {
    "none": "no norm",
    "local": "per-device batch norm",
    "sync": "synchronized batch norm",
    "group_norm": "group norm",
}


class Cell(NamedTuple):
    """A cell: its symbol, and at most six words."""

    symbol: str
    words: str

    @property
    def tone(self) -> str:
        """The CSS class of the cell."""
        return TONES[self.symbol]


def norm_cell(one: Finding, side: str) -> Cell:
    """The verdict on a norm. Its conditions are in the section of the claim."""
    words = one.verdicts.get(side, NOT_ASKED)
    rows = [row for row in one.rows if row.side == side and row.says != MEASURED]
    so_far = " so far" * ("(so far" in words)
    if words in (NOT_ASKED, NOT_RUN):
        return Cell(UNTESTED, "not tested" if words == NOT_ASKED else words)
    if words.startswith(f"{HOLDS} only"):
        return Cell(PARTLY, _shortest(_partly(one, rows), so_far))
    if words.startswith(HOLDS):
        return Cell(HELD, f"holds{so_far}")
    if words.startswith(FAILS):
        return Cell(FAILED, f"fails{so_far}")
    return Cell(UNKNOWN, _shortest(_undecided(one, rows), so_far))


def sharing_cell(one: Finding) -> Cell:
    """Synchronized compared with per-device statistics."""
    there = {word for word in (BETTER, WORSE) if word in (part.split()[0] for part in _parts(one.sharing))}
    if len(there) == 2:
        counts = ", ".join(f"{word} in {len(_of(one.versus, word))}" for word in (BETTER, WORSE))
        return Cell(PARTLY, counts if one.versus else "better and worse")
    if there:
        (word,) = there
        return Cell(HELD if word == BETTER else FAILED, _shortest(_where(one, word)))
    if one.sharing == SAME:
        return Cell(EQUAL, SAME)
    if one.sharing in ("", NOT_RUN):
        return Cell(UNTESTED, one.sharing or "not tested")
    same = sum(case.word == SAME or case.is_small for case in one.versus)
    return Cell(UNKNOWN, f"undecided in {len(one.versus) - same} of {_cases(one.versus)}" if same else "undecided")


def main_side(findings: Iterable[Finding]) -> str:
    """The norm of the summary: ``sync``, or the first one if no claim has it; "" without norms."""
    sides = list(dict.fromkeys(side for one in findings for side in one.sides))
    return "sync" if "sync" in sides else next(iter(sides), "")


def summary(findings: Sequence[Finding]) -> list[str]:
    """One or two sentences that answer what the page asks."""
    side = main_side(findings)
    name = IN_WORDS.get(side, side)
    if len(findings) == 1:
        return [f"With {name}, the claim {clause(norm_cell(findings[0], side))}.", *_sharing_of_one(findings[0])]
    by_symbol = _numbers((norm_cell(one, side).symbol, one.number) for one in findings)
    held = by_symbol.get(HELD, [])
    parts = [
        f"{len(held) or 'none'} of {plural(len(findings), 'claim')} {'holds' if len(held) < 2 else 'hold'}{_in(held)}"
    ]
    verbs = {PARTLY: ("holds in part", "hold in part"), FAILED: ("fails", "fail")}
    verbs |= {UNKNOWN: ("is undecided", "are undecided"), UNTESTED: ("was not tested", "were not tested")}
    for symbol, (singular, many) in verbs.items():
        numbers = by_symbol.get(symbol, [])
        if numbers:
            parts.append(f"{len(numbers)} {singular if len(numbers) == 1 else many}{_in(numbers)}")
        elif symbol == FAILED:
            parts.append("none fails")
    return [f"With {name}, {listed(parts)}.", *_sharing_of_all(findings)]


def clause(cell: Cell) -> str:
    """The cell as the end of a sentence: "holds", "is undecided", "was not tested"."""
    first = cell.words.split()[0].rstrip(";,")
    return {"undecided": "is ", "not": "was "}.get(first, "") + cell.words.replace("; fails", ", and fails")


def _sharing_of_one(one: Finding) -> list[str]:
    cell = sharing_cell(one)
    if cell.symbol == UNTESTED:
        return []
    if cell.symbol == UNKNOWN:
        return ["Whether it is better or worse than per-device batch norm is undecided."]
    return [f"Synchronized against per-device statistics: {cell.words}."]


def _sharing_of_all(findings: Sequence[Finding]) -> list[str]:
    by_symbol = _numbers((sharing_cell(one).symbol, one.number) for one in findings)
    words = {FAILED: "worse in", HELD: "better in", PARTLY: "better and worse in", EQUAL: "no different in"}
    parts = [f"{words[symbol]} {_claims(by_symbol[symbol])}" for symbol in words if symbol in by_symbol]
    if UNKNOWN in by_symbol:
        rest = len(findings) - sum(len(by_symbol.get(symbol, [])) for symbol in words)
        is_rest = len(by_symbol[UNKNOWN]) == rest
        others = f"the other {rest}" if parts else "all claims"
        parts.append(f"undecided in {others if is_rest else _claims(by_symbol[UNKNOWN])}")
    return [f"Compared with per-device batch norm, it is {listed(parts)}."] if parts else []


def _numbers(pairs: Iterable[tuple[str, int]]) -> dict[str, list[str]]:
    """The numbers of claims by symbol."""
    found = dict[str, list[str]]()
    for symbol, number in pairs:
        found.setdefault(symbol, []).append(str(number))
    return found


def _claims(numbers: Sequence[str]) -> str:
    return f"{'claim' if len(numbers) == 1 else 'claims'} {listed(numbers)}"


def _in(numbers: Sequence[str]) -> str:
    return f" ({listed(numbers)})" if numbers else ""


def _partly(one: Finding, rows: Sequence[Row]) -> list[str]:
    """Wordings of a verdict that holds in part, the most informative first."""
    yes, no = ([row for row in rows if row.says == word and row.n] for word in ("yes", "no"))
    only = " only" * (len(yes) + len(no) == len(rows))
    wordings = [f"holds{only} {names}"] if (names := _names(one, yes)) else []
    if only and (names := _names(one, no)):
        wordings += [f"holds, but not {names}", f"holds, not {names}"]
    return [*wordings, *([f"holds in {len(yes)} of {_cases(rows)}"] if yes else []), "holds in part"]


def _undecided(one: Finding, rows: Sequence[Row]) -> list[str]:
    no = [row for row in rows if row.says == "no" and row.n]
    if not no:
        return ["undecided"]
    wordings = [f"undecided; fails {names}"] if (names := _names(one, no)) else []
    return [*wordings, f"undecided; fails in {len(no)} of {len(rows)}"]


def _where(one: Finding, word: str) -> list[str]:
    """Wordings for sharing that is better, or worse, in some cases."""
    there = _of(one.versus, word)
    if not there or len(there) == len(one.versus):
        return [word]
    wordings = [f"{word} {names}"] if (names := _names(one, there)) else []
    return [*wordings, f"{word} in {len(there)} of {_cases(one.versus)}", word]


def _names(one: Finding, cases: Sequence[Row | Versus]) -> str:
    """The short names of cases; "" if there is none, or one of them has no short name."""
    short = [one.labels[case.case].short if case.case in one.labels else "" for case in cases]
    return " and ".join(short) if all(short) else ""


def _of(versus: Sequence[Versus], word: str) -> list[Versus]:
    return [case for case in versus if case.word == word and not case.is_small]


def _cases(rows: Sequence[Row | Versus]) -> str:
    return plural(len(rows), "case")


def _parts(sharing: str) -> list[str]:
    return [part for part in sharing.split("; ") if part.strip()]


def _shortest(wordings: Sequence[str], end: str = "") -> str:
    """The first wording that, with its end, has few enough words; the last one if none has."""
    fitting = (words + end for words in wordings if len((words + end).split()) <= MOST_WORDS)
    return next(fitting, wordings[-1] + end)
