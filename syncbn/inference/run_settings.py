"""Reads the ``config.yaml`` of a run as plain data. The file may come from someone else."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from syncbn.training.errors import as_typed
from syncbn.training.read_file import DamagedError, out_of_range, read_text
from syncbn.training.run_directory import record
from syncbn.training.run_directory.paths import short

LARGEST = 2**20  # bytes; a config.yaml has 5,000


def read(run_dir: Path) -> dict[str, Any]:
    """The settings, with interpolations as they are written; empty if there is no ``config.yaml``.

    Raises:
        DamagedError: the file cannot be read, is too large, or does not contain the settings of a run.
    """
    path = run_dir / "config.yaml"
    try:
        if path.stat().st_size > LARGEST:
            raise DamagedError(short(path, resolve=False), f"is damaged (more than {LARGEST} bytes)")
        # OmegaConf expands aliases, and a short file can name ten thousand million values.
        wrong = out_of_range(yaml.safe_load(read_text(path)))
    except FileNotFoundError:
        return {}
    except DamagedError as error:
        raise DamagedError(short(path, resolve=False), error.hint) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        wrong = ""  # the next lines report it
    if wrong:
        raise DamagedError(short(path, resolve=False), f"is damaged ({wrong})")
    found = record.settings(run_dir)
    written: Any = {} if found is None else OmegaConf.to_container(found)
    return dict(written)


def versions(run_dir: Path | None) -> str:
    """A sentence about the versions with which the run was trained, for an error message; "" if they are the same."""
    about = {} if run_dir is None else record.read(run_dir, "run").get("versions")
    trained = about if isinstance(about, dict) else {}
    now = record.versions()
    differ = [name for name in ("syncbn", "torch") if trained.get(name) not in (None, now.get(name))]
    if not differ:
        return ""
    before = ", ".join(f"{name} {as_typed(trained[name])[:40]}" for name in differ)
    installed = ", ".join(f"{name} {now.get(name)}" for name in differ)
    return f"; it was trained with {before}, installed {'is' if len(differ) == 1 else 'are'} {installed}"
