"""Writes small files that are there whole or not at all, and never through a symbolic link."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a run writes to without replacing it. Other files of a run directory are replaced, which replaces a link too.
APPENDED = ("metrics.csv", "statistics.csv", "gradients.csv", "wandb-lines.jsonl", "error.txt", "train.log")
FOLDERS = ("checkpoints", "ranks", "wandb")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which then takes the place of ``path``; one that cannot be written leaves the old file alone.

    A process that is killed may leave the draft, under one name for each ``path``: the next one writes over it.
    """
    draft = unlinked(path.with_name(f".{path.name}"))
    try:
        yield draft
        draft.replace(path)
    except OSError:  # no space left, say
        draft.unlink(missing_ok=True)
        raise


def unlinked(path: Path) -> Path:
    """``path``, to be written. A symbolic link there is removed: writing to it would change a file elsewhere."""
    if path.is_symlink():
        path.unlink()
    return path


def detach(run_dir: Path) -> list[str]:
    """Replaces symbolic links in a run directory, where writing to them would change files elsewhere.

    A link to a file becomes a copy. A link to a directory becomes a directory of links to what is in it, so that its
    checkpoints can be read, and neither replaced nor deleted. A broken link is removed.

    Returns:
        The names of what was a link.
    """
    names = [name for name in (*APPENDED, *FOLDERS) if (run_dir / name).is_symlink()]
    for name in names:
        path, draft = run_dir / name, run_dir / f".{name}.part"
        if path.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for each in sorted(path.resolve().iterdir()):
                (draft / each.name).symlink_to(each)
            path.unlink()  # a directory cannot replace a link
            draft.rename(path)
        elif path.is_file():
            shutil.copyfile(path, unlinked(draft))
            draft.replace(path)
        else:
            path.unlink()
    return names
