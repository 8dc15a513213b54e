"""Writes the pages of reports again from their tables, without the runs: for example after an update."""

import json
from pathlib import Path

from syncbn.study.claims.report.remake import remake
from syncbn.study.report import examples, write
from syncbn.study.report.expectations import Answer
from syncbn.study.report.read import read
from syncbn.training.errors import SettingError


def rewrite(directory: Path) -> list[Path]:
    """Writes all reports in a directory and below it again: of comparisons, of studies, and on claims.

    Returns:
        The paths of the written ``report.html``.

    Raises:
        SettingError: there is no report in the directory, or a table of one cannot be read.
    """
    written, done = [], set()
    for path in sorted(directory.glob(f"**/{write.PARTS}")):
        title, question, names, expected = _page(path)
        place = path.parent
        parts = {name: read(place / name) for name in names}
        written.append(
            write.write_several(title, question, parts, place, expected=expected, shown=examples.read(place))
        )
        done |= {place / name for name in parts}
    alone = {path.parents[1] for path in directory.glob(f"**/tables/{write.COMPARISON}")} - done
    written += [write.write(read(place), place) for place in sorted(alone)]
    written += [remake(path.parents[1]) for path in sorted(directory.glob("**/tables/claims.json"))]
    if not written:
        raise SettingError("DIRECTORY", directory, "there is no report in it; syncbn compare writes one")
    return written


def _page(path: Path) -> tuple[str, str, list[str], list[Answer]]:
    """Title, question, names of the comparisons, and expected effects of a page of several."""
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
        expected = [Answer(**each) for each in page.get("expected", [])]
        return page["title"], page["question"], list(page["parts"]), expected
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = f"{path.name} cannot be read ({type(error).__name__}: {error}); write the report again from the runs"
        raise SettingError("DIRECTORY", path.parent, hint) from error
