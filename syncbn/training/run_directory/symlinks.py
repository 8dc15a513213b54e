"""Replaces symbolic links in a run directory, through which a run would change files elsewhere."""

import shutil
from pathlib import Path

from syncbn.training.atomic_write import unlinked
from syncbn.training.console import printable
from syncbn.training.errors import SettingError

# Files that a run appends to. It writes other files by renaming a draft, which replaces a symbolic link.
APPENDED = ("metrics.csv", "statistics.csv", "gradients.csv", "wandb-lines.jsonl", "error.txt", "train.log")
FOLDERS = ("checkpoints", "ranks", "wandb", "tensorboard")


def detach(run_dir: Path) -> list[str]:
    """Replaces symbolic links in a run directory through which the run would change files elsewhere.

    A link to a file becomes a copy. A link to a directory becomes a directory of links to its files, so that the run
    can read the checkpoints in it, but neither replaces nor deletes them. A broken link is removed.

    Returns:
        The names of the replaced links.

    Raises:
        SettingError: a file that is written to is a pipe, a socket or a device.
    """
    for path in (run_dir / name for name in APPENDED):
        if path.exists() and not path.is_file():
            raise SettingError(printable(path), hint="this is no regular file, and the run writes to it; remove it")
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
