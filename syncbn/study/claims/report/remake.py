"""``remake``: writes the page on claims again from its tables, without the runs."""

from pathlib import Path

from syncbn.study.claims.report import page, stored


def remake(directory: Path) -> Path:
    """Writes the page of a directory and its plots again, from ``tables/*.csv`` and ``tables/claims.json``.

    The result is the same as that of :func:`syncbn.study.claims.report.page.write`, to the byte, with the same
    versions of the libraries. Tables are read and not changed.

    Args:
        directory: that of the page.

    Returns:
        The path of the HTML file.

    Raises:
        SettingError: a table is missing or damaged, or was written by a version without ``claims.json``.
    """
    return page.render(stored.read(directory / "tables"), directory)
