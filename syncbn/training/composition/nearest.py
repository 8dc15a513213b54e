"""Finds the name that a mistyped one was meant to be."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from syncbn.training import program

CLOSE = 0.6  # difflib's ratio above which two names look alike
MOST = 12  # names in a list
# Names that other libraries have for a setting, which look nothing like ours.
SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "bs": "batch_size",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "steps": "max_steps",
    "workers": "num_workers",
    "gpus": "devices",
    "amp": "precision",
}


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that ``name`` may have meant, the best first; [] if none looks like it.

    Names are dotted. One whose last part is the same is nearer than any other: ``lr`` means ``optimizer.lr``.
    """
    known = sorted(set(names))
    if name in known:
        return [name]
    head, _, rest = name.partition(".")
    own = [each.partition(".")[2] for each in known if rest and each.startswith(f"{head}.")]
    if own and (found := nearest(rest, own)):  # the group is right, so the name is one of its own
        return [f"{head}.{each}" for each in found]
    last = name.rpartition(".")[2]
    for word in filter(None, (last, SYNONYMS.get(last))):
        if same := [each for each in known if each.rpartition(".")[2] == word]:
            return (rest and get_close_matches(name, same, n=1, cutoff=CLOSE)) or same
    return [] if own else get_close_matches(name, known, n=1, cutoff=CLOSE)


def listed(names: Iterable[str]) -> str:
    """``there are a, b``: the names in alphabetical order, at most ``MOST`` of them."""
    known = sorted(names)
    more = f" and {len(known) - MOST} more" if len(known) > MOST + 1 else ""
    known = known[:MOST] if more else known
    return f"there {'is' if len(known) == 1 else 'are'} {', '.join(known) or 'none'}{more}"


def suggestion(name: str, names: Sequence[str], kind: str = "setting") -> str:
    """A sentence that names the nearest of ``names``, or all of them if none is near and they are few.

    Args:
        name: the mistyped one.
        names: those that exist.
        kind: what they are; the program lists settings, which are many.
    """
    found = nearest(name, names)
    if found:
        verb = "are" if len(found) > 1 else "is"
        return f"the nearest {verb} {', '.join(found)}"
    return listed(names) if len(names) <= MOST or kind != "setting" else f"{program.name()} --help lists them"
