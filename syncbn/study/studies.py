"""``python train.py +study=NAME``: the runs of a study, those that are missing, and its report."""

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.study import elsewhere, expected, plan
from syncbn.study.plan import Cell
from syncbn.training import attempts, config, identity, record, several
from syncbn.training.outcome import Outcome
from syncbn.training.ranks import Requests
from syncbn.training.schema import SettingError
from syncbn.training.several import Run

OUTPUT_DIR = "${hydra:runtime.output_dir}"


def main(cfg: DictConfig) -> None:
    """Runs the study of ``cfg.study`` under Hydra, or lists its runs (``study.dry_run``). Ends the program by itself
    where a run has failed, or a setting cannot work: one line, code 1.
    """
    root = Path(HydraConfig.get().runtime.output_dir)
    try:
        _check()
        study: dict[str, Any] = OmegaConf.to_container(cfg.study, resolve=True)  # type: ignore[assignment]
        cells = plan.cells(study, _overrides(), root)
        runs = compose(cells, here=not (study["dry_run"] or study["report_only"]))
        if study["dry_run"]:
            _list(study, cells, runs)
            return
        _refuse_others(runs, study)
        code = 0 if study["report_only"] else _run(study, runs, root)
        if code < 2:
            from syncbn.study import pages

            settings = [each for each in HydraConfig.get().overrides.task if "study.report_only=" not in each]
            pages.write(cfg, study, cells, root, shlex.join(["python", "train.py", *settings]))
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    if code:
        sys.exit(code)


def compose(cells: Sequence[Cell], *, here: bool = True) -> list[Run]:
    """The settled settings of each cell, composed as ``train.py`` with its overrides would.

    Args:
        cells: of a study.
        here: what has not finished is to run on this machine, and refused if it cannot.

    Raises:
        SettingError: settings that cannot be composed, or cannot work.
    """
    composed: dict[tuple[str, ...], str] = {}
    runs = []
    for cell in cells:
        # Cells that differ in their seed alone are composed once: that takes a tenth of a second.
        key = tuple(each for each in cell.overrides if not each.startswith("seed="))
        if key not in composed:
            try:
                composed[key] = OmegaConf.to_yaml(hydra.compose(HydraConfig.get().job.config_name, list(key)))
            except (HydraException, OmegaConfBaseException) as error:
                raise SettingError(f"study.parts.{cell.part}: {' '.join(str(error).split())}") from error
        cfg = OmegaConf.create(composed[key].replace(OUTPUT_DIR, str(cell.directory)))
        assert isinstance(cfg, DictConfig)
        cfg.seed = cell.seed
        if here and record.read(cell.directory, "run").get("status") != "finished":
            elsewhere.refuse(cfg)
            config.settle(cfg)
        else:
            elsewhere.settle(cfg)
        runs.append(Run(cfg, cell.directory, cell.overrides))
    return runs


def _check() -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise SettingError("-m: a study makes its own runs; leave it out")
    if identity.launcher():
        raise SettingError(
            f"+study: {identity.launcher()} starts the ranks of one run; call python train.py, or take the runs that "
            "study.dry_run=true lists"
        )


def _overrides() -> list[str]:
    """The user's, but those for the study itself."""
    return [each for each in HydraConfig.get().overrides.task if not each.lstrip("+~").startswith(("study=", "study."))]


def _list(study: dict[str, Any], cells: Sequence[Cell], runs: Sequence[Run]) -> None:
    figures = {name: expected.parse(part.get("expected", [])) for name, part in study["parts"].items()}
    for cell, run in zip(cells, runs, strict=True):
        beside = [str(each) for each in figures[cell.part] if each.is_of(cell.side, run.cfg)]
        print(elsewhere.command(run), *(["  # expected:", "; ".join(beside)] if beside else []))
    numbers = sorted(Counter(config.world_size(run.cfg) for run in runs).items())
    how = ", ".join(f"{count} of {size} {'process' if size == 1 else 'processes'}" for size, count in numbers)
    print(f"study {study['name']}, budget {study['budget']}: {len(cells)} runs: {how}")


def _refuse_others(runs: Sequence[Run], study: dict[str, Any]) -> None:
    """Runs of this directory that were made, or begun, with other settings are of another study."""
    for run in runs:
        file = run.directory / "config.yaml"
        before = OmegaConf.load(file) if file.exists() else run.cfg
        assert isinstance(before, DictConfig)
        if changes := attempts.changes_of(run.cfg, before, attempts.HARMLESS):
            raise SettingError(
                f"study.directory={study['directory']}: its runs were made with other settings ({', '.join(changes)}); "
                "use another directory, or the same settings"
            )


def _run(study: dict[str, Any], runs: list[Run], root: Path) -> int:
    cores = os.cpu_count() or 1
    slots = study["slots"] or cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // slots)))
    identity.hold(root)
    progress = _Progress(len(runs), root)
    with Requests(lambda signum: print("stopping the runs that are under way ...", file=sys.stderr)) as requests:
        outcomes = several.run_all(runs, slots, requests, progress.ended)
    progress.say()
    if requests.seen:
        left = len(runs) - sum(each.status == "finished" for each in outcomes.values())
        print(f"error: stopped with {left} of {len(runs)} runs to do; the same command does them", file=sys.stderr)
        return 128 + requests.seen[0]
    failed = sum(each.status != "finished" for each in outcomes.values())
    if failed:
        print(f"error: {failed} of {len(runs)} runs failed; the same command does them again", file=sys.stderr)
    return int(failed > 0)


class _Progress:
    """A line now and then, and one for each run that fails."""

    def __init__(self, total: int, root: Path) -> None:
        self.total, self.root, self.ends = total, root, Counter[str]()
        self.began = self.told = time.monotonic()

    def ended(self, run: Run, outcome: Outcome) -> None:
        self.ends[outcome.status] += 1
        if outcome.status == "failed":
            print(f"{run.directory.relative_to(self.root)}: {outcome.message}", file=sys.stderr, flush=True)
        if time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            self.say()

    def say(self) -> None:
        failed = f" ({self.ends['failed']} failed)" if self.ends["failed"] else ""
        seconds = time.monotonic() - self.began
        print(f"{self.ends['finished']} of {self.total} runs{failed}, {seconds:.0f} s", flush=True)
