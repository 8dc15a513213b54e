"""Checks of the environment of a run: its launcher, Slurm and Weights & Biases (W&B)."""

import netrc
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from syncbn.doctor.rows import Row, failed, ok, warning
from syncbn.training import program
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.config.schema import WandbConfig

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
UP = ("idle", "mix", "alloc", "comp")  # states of a node that runs jobs; a trailing star means that it does not respond


def launcher(env: Mapping[str, str] = os.environ) -> list[Row]:
    """Determine the launcher from environment variables; one FAILED row for each contradiction between them."""
    wrong = _contradictions(env)
    if wrong:
        return [failed("launcher", found, fix) for found, fix in wrong]
    if "TORCHELASTIC_RUN_ID" in env:
        rank = f"rank {env['RANK']} of {env['WORLD_SIZE']}, {env['LOCAL_WORLD_SIZE']} of them on this node"
        return [ok("launcher", f"torchrun: this is {rank}")]
    if "RANK" in env:
        found = f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, but not by torchrun"
        return [warning("launcher", found, f"unset them: {program.name()} starts the ranks itself, torchrun sets them")]
    if "SLURM_STEP_ID" in env:
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_JOB_NUM_NODES", "1"))
        where = f"of {tasks}, {nodes} node{'s' if nodes != '1' else ''}, job {env.get('SLURM_JOB_ID', 'unknown')}"
        return [ok("launcher", f"srun: this is task {env.get('SLURM_PROCID', '0')} {where}")]
    if "SLURM_JOB_ID" not in env and "SLURM_NTASKS" in env:
        found = f"SLURM_NTASKS={env['SLURM_NTASKS']} is set, but this is not a Slurm job (no SLURM_JOB_ID)"
        return [
            warning("launcher", found, "unset SLURM_NTASKS: because of it, Lightning assumes a job started by srun")
        ]
    if "SLURM_JOB_ID" in env:
        found = f"in Slurm job {env['SLURM_JOB_ID']}, but not started by srun"
        if env.get("SLURM_NTASKS", "1") != "1":
            fix = f"srun {program.name()}; without srun, only one of the job's tasks would run"
            return [warning("launcher", f"{found}: SLURM_NTASKS={env['SLURM_NTASKS']} tasks were requested", fix)]
        return [ok("launcher", f"{found}: {program.name()} starts the ranks, on this node only")]
    return [ok("launcher", f"none: {program.name()} starts the ranks")]


def _contradictions(env: Mapping[str, str]) -> list[tuple[str, str]]:
    """Contradictions between the launchers' environment variables, each with a fix."""
    numbers = {name: env[name] for name in (*RANKS, "SLURM_NTASKS", "SLURM_PROCID") if name in env}
    wrong = [
        (f"{name}={value} is not a number", f"unset {name}") for name, value in numbers.items() if not value.isdigit()
    ]
    if wrong:
        return wrong
    elastic = "TORCHELASTIC_RUN_ID" in env
    present = [name for name in RANKS if name in env]
    missing = [name for name in (RANKS if elastic else RANKS[:2]) if name not in env]
    if missing and (present or elastic):
        if elastic:
            present = ["TORCHELASTIC_RUN_ID", *present]
        found = f"{', '.join(f'{name}={env[name]}' for name in present)} without {', '.join(missing)}"
        return [(found, f"unset {' '.join(present)}, or start with torchrun, which sets all of them")]
    values = {name: int(value) for name, value in numbers.items()}
    for low, high in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if low in values and high in values and values[low] >= values[high]:
            found = f"{low}={values[low]} is not below {high}={values[high]}"
            wrong.append((found, f"unset both; {'srun' if low.startswith('SLURM') else 'torchrun'} sets them"))
    if values.get("LOCAL_WORLD_SIZE", 0) > values.get("WORLD_SIZE", 0):
        found = f"LOCAL_WORLD_SIZE={values['LOCAL_WORLD_SIZE']} is more than WORLD_SIZE={values['WORLD_SIZE']}"
        wrong.append((found, "unset both; torchrun sets them"))
    return wrong


def slurm(limit: float = 10) -> list[Row]:
    """Check Slurm's commands, each within ``limit`` seconds, and count the nodes that are up."""
    commands = ("sinfo", "sbatch", "scontrol")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands):
        return [ok("Slurm", "not installed")]
    if missing:
        found = f"{', '.join(name for name in commands if name not in missing)}, but no {', '.join(missing)}"
        return [warning("Slurm", found, "install Slurm's client commands, or load their module")]
    try:
        release = _output("sinfo", "--version", limit=limit).strip()
        lines = _output("sinfo", "--noheader", "--Node", "--format=%N|%P|%t", limit=limit).split()
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        found = f"sinfo does not answer: {' '.join(str(reason).split())}"
        return [warning("Slurm", found, "check whether slurmctld runs: scontrol ping")]
    fields = [line.split("|") for line in lines]
    nodes = {node: state for node, _, state in fields}
    up = {node for node, state in nodes.items() if state.rstrip("~#%$@^-+!").startswith(UP) and "*" not in state}
    partitions = ", ".join(dict.fromkeys(partition.rstrip("*") for _, partition, _ in fields))
    found = f"{release}: {len(up)} of {len(nodes)} nodes up; partitions {partitions or 'none'}"
    if not up:
        return [warning("Slurm", found, "jobs will wait; sinfo -R shows why nodes are down")]
    return [ok("Slurm", found)]


def _output(*command: str, limit: float) -> str:
    done = subprocess.run(command, capture_output=True, check=True, timeout=limit, encoding="utf-8", errors="replace")
    return done.stdout


def wandb(conf: Path | None = None, limit: float = 5) -> list[Row]:
    """Check how W&B would run.

    The server is contacted, for ``limit`` seconds, only if a run would contact it, or if WANDB_MODE=online is set.
    """
    conf = conf or conf_directory() / "logger/wandb.yaml"
    mode, source = str(WandbConfig().mode), "the default"
    if conf.is_file():
        mode, source = str(OmegaConf.select(OmegaConf.load(conf), "mode", default=mode)), str(conf)
    wanted = os.environ.get("WANDB_MODE")
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = _key_source(url)
    found = f"mode {mode} ({source}); {f'an API key is in {key}' if key else 'no API key'}"
    if "online" not in (mode, wanted):
        return [ok("W&B", found)]
    row, offline = (
        (failed, "; or keep runs on this machine: logger.mode=offline") if mode == "online" else (warning, "")
    )
    if mode != "online":
        found += f"; WANDB_MODE=online is set, but {program.name()} uses logger.mode"
    if key is None:
        return [row("W&B", found, f"wandb login{offline}")]
    try:
        _request(url, limit)
    except OSError as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        found += f"; {url} does not answer within {limit:g} s ({reason})"
        return [row("W&B", found, f"check the network and WANDB_BASE_URL{offline}")]
    found += f"; {url} answers"
    return [ok("W&B", found) if mode == "online" else warning("W&B", found, f"{program.name()} logger.mode=online")]


def _request(url: str, limit: float) -> None:
    with suppress(urllib.error.HTTPError):  # an HTTP error status is an answer too
        urllib.request.urlopen(url, timeout=limit).close()


def _key_source(url: str) -> str | None:
    """The variable or file in which W&B will find an API key; never the key itself."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    home = Path.home()
    path = Path(os.environ.get("NETRC") or next((p for p in (home / ".netrc", home / "_netrc") if p.exists()), ""))
    try:
        return str(path) if path.is_file() and netrc.netrc(path).authenticators(urlsplit(url).netloc) else None
    except (OSError, netrc.NetrcParseError):
        return None
