"""Composes the line that a run prints at its start and the table of results that it prints at its end."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from syncbn.training.config.plan import Plan
from syncbn.training.config.validate_optimization import samples_per_step
from syncbn.training.console import cell
from syncbn.training.evaluation import class_accuracy
from syncbn.training.loggers import wandb_files
from syncbn.training.metrics import peak_memory
from syncbn.training.run_directory.paths import short
from syncbn.training.run_directory.record import damage, read, read_whole
from syncbn.training.terminal import metric_rows, viewer_rows
from syncbn.training.terminal.result_table import ResultTable


def _samples(count: float) -> str:
    return f"{count} sample{'s' * (count != 1)}"


def headline(plan: Plan) -> str:
    """One line that describes the run: processes, batch size, norm, and how many samples share statistics."""
    cfg, norm = plan.cfg, plan.cfg.norm
    ranks = f"{plan.devices} {'process' if plan.devices == 1 else 'processes'} on the {plan.accelerator.upper()}"
    if plan.simulated:
        ranks = f"{ranks} for {plan.simulated} devices"
    if plan.num_nodes > 1:
        ranks = f"{plan.num_nodes} nodes of {ranks}"
    adapts = _adapts(plan) if cfg.get("adapt") is not None else ""
    if cfg.get("mode") == "test":
        return f"{ranks}, {_samples(plan.batch_size)} each; tests {short(Path(str(plan.checkpoint)))}{adapts}"
    share = ""
    if norm.get("ghost_batch") is not None:
        share = " in ghost batches"
    elif norm.name in ("sync", "torch_sync"):
        share = f" over {norm.get('group', 'world')}"
    elif norm.name == "shuffle":
        share = f" of samples over {plan.replicas} device{'s' * (plan.replicas != 1)}, in {norm.part}"
    batch = plan.normalization_batch
    search = "; searches a learning rate" if cfg.get("mode") == "find_lr" else ""
    statistics = f"statistics of {_samples(batch)}" if batch else "no batch statistics"
    more = f"{adapts}{_scaled_lr(plan)}{search}"
    return f"{ranks}, {_samples(plan.batch_size)} each; norm {norm.name}{share}: {statistics}{more}"


def _scaled_lr(plan: Plan) -> str:
    """The learning rate, if it was scaled with the samples of an optimizer step."""
    optimizer = plan.cfg.optimizer
    if optimizer.get("lr_given") is None:
        return ""
    samples = samples_per_step(plan.cfg)
    return f"; lr {optimizer.lr:.4g} = {optimizer.lr_given:g} x {samples}/{optimizer.lr_batch} samples per step"


def _adapts(plan: Plan) -> str:
    """How many samples batch norm adapts to in the test, and the weight of the training statistics beside them."""
    adapt = plan.cfg.adapt
    prior = adapt.get("prior", 16)
    to = "all samples so far" if adapt.get("streaming") else f"batches of {plan.adaptation_batch}"
    return f"; in the test batch norm adapts to {to}, with a prior of {prior:g}"


def summary(run_dir: Path) -> Group:
    """The results of a run and the paths of its files as a table, and the command that uploads it to W&B.

    A run of an earlier version may lack some results. A run whose rank called ``sys.exit`` has none.
    """
    result, wandb, about = read_whole(run_dir, "result"), read(run_dir, "wandb"), read_whole(run_dir, "run")
    try:
        rows = _result_rows(result) if result else [("result", "none: a rank ended by sys.exit before the end")]
    except (TypeError, ValueError, AttributeError, KeyError):  # values of the wrong type
        result = {}
    if not result and damage(run_dir, "result"):
        rows = [("result", f"{short(run_dir / 'result.json')} is damaged")]
    if tested := about.get("tests"):
        rows.append(("checkpoint tested", short(Path(tested))))
    rows.append(("run directory", short(run_dir)))
    if result.get("checkpoint"):
        rows.append(("best checkpoint", short(Path(result["checkpoint"]))))
    elif result.get("tested") == "final weights":
        rows.append(("tested", "the weights at the end of training: there is no best checkpoint"))
    attempts = wandb_files.directories(run_dir) if wandb else []
    if wandb.get("url") or attempts:  # the user may have removed the directories
        rows.append(("W&B run", wandb.get("url") or short(attempts[-1])))
    rows += viewer_rows.rows(run_dir)
    lines: list[RenderableType] = [ResultTable(rows)]
    options, directories = wandb_files.upload(run_dir)
    if directories:
        command = shlex.join([_program("wandb"), *options, *map(short, directories)])
        lines.append(cell(f"upload it:  {command}"))
    return Group(*lines)


def _result_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table that show ``result.json``."""
    rows = []
    test = result.get("test", {})
    if "test/acc" in test:
        of = f" of {test['test/count']:.0f} samples" if "test/count" in test else ""
        rows.append(("test accuracy", f"{100 * test['test/acc']:.2f} %{of}"))
    if "test/loss" in test:
        rows.append(("test loss", f"{test['test/loss']:.4f}"))
    rows += metric_rows.rows(result)
    if classes := result.get("classes"):
        rows.append(("worst classes", class_accuracy.worst(classes)))
    fit = result.get("fit", {})
    if "fit/acc" in fit:
        rows.append(("training images", f"{100 * fit['fit/acc']:.2f} % of them known"))
    precise = result.get("precise", {})
    if "precise/acc" in precise:
        rows.append(("precise accuracy", f"{100 * precise['precise/acc']:.2f} % with population statistics"))
    corrupted, adapted = result.get("corrupted", {}), result.get("adapted", {})
    if "corrupted/acc" in corrupted:
        better = f", {100 * adapted['adapted/acc']:.2f} % with adapted statistics" if "adapted/acc" in adapted else ""
        rows.append(("corrupted accuracy", f"{100 * corrupted['corrupted/acc']:.2f} %{better}"))
    training = [f"{result['seconds']:.1f} s"] if "seconds" in result else []
    training += [_counted(result[name], name) for name in ("epochs", "steps") if name in result]
    if before := result.get("epochs_before"):
        first = "the first epoch" if before == 1 else f"the first {before} epochs"
        training.append("all of them before" if before == result.get("epochs") else f"{first} before")
    if result.get("diverged"):
        training.append("ended by a loss or weights that are not finite")
    if target := result.get("target"):
        took = f"{target['target/steps']} steps"
        took += f", {target['target/seconds']:.1f} s" if "target/seconds" in target else ""
        rows.append(("target", f"{'reached after' if target['target/reached'] else 'not reached in'} {took}"))
    if leak := result.get("leak"):
        together, spread, revealed = (leak[f"leak/{name}"] for name in ("together", "spread", "difference"))
        rows.append(("leak", f"{revealed:.4f} of pretext accuracy: {together:.4f} together, {spread:.4f} spread"))
    if found := result.get("find_lr"):
        rows.append(("suggested lr", f"{found['lr']:.3g}, after {found['steps']} steps"))
    if early := result.get("stopped_early"):
        rows.append(("stopped early", f"after epoch {early['epoch']}: {early['reason']}"))
    if training:
        rows.append(("training", ", ".join(training)))
    if speed := result.get("images_per_second"):
        share = result.get("mfu", {}).get("mfu/share")
        of_peak = f", {100 * share:.1f} % of the GPUs' peak (MFU)" if share is not None else ""
        rows.append(("speed", f"{speed:,.0f} images/s over all devices{of_peak}"))
    if memory := result.get("memory"):
        rows.append(("peak memory", peak_memory.described(memory)))
    return rows


def _counted(number: int, things: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{number} {things.removesuffix('s') if number == 1 else things}"


def _program(name: str) -> str:
    """The name of a command if it is on the PATH; otherwise its path in this Python environment."""
    return name if shutil.which(name) else short(Path(sys.executable).parent / name, resolve=False)
