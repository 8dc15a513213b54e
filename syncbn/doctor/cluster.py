"""What a run would find around it: who launches it, Slurm, Weights & Biases."""

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
from syncbn.training.config.schema import WandbConfig

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
UP = ("idle", "mix", "alloc", "comp")  # a node that runs jobs; with a star behind it does not answer


def launcher(env: Mapping[str, str] = os.environ) -> list[Row]:
    """Who started this process, as the environment has it; a row FAILED for each thing in it that cannot be."""
    wrong = _contradictions(env)
    if wrong:
        return [failed("launcher", found, fix) for found, fix in wrong]
    if "TORCHELASTIC_RUN_ID" in env:
        of = f"rank {env['RANK']} of {env['WORLD_SIZE']}, {env['LOCAL_WORLD_SIZE']} of them on this node"
        return [ok("launcher", f"torchrun: this is {of}")]
    if "RANK" in env:
        found = f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, but not by torchrun"
        return [warning("launcher", found, "unset them: python train.py starts ranks of its own, torchrun sets them")]
    if "SLURM_STEP_ID" in env:
        tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
        nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_JOB_NUM_NODES", "1"))
        where = f"of {tasks}, {nodes} node{'s' if nodes != '1' else ''}, job {env.get('SLURM_JOB_ID', 'unknown')}"
        return [ok("launcher", f"srun: this is task {env.get('SLURM_PROCID', '0')} {where}")]
    if "SLURM_JOB_ID" not in env and "SLURM_NTASKS" in env:
        found = f"SLURM_NTASKS={env['SLURM_NTASKS']} is set, but this is no Slurm job (no SLURM_JOB_ID)"
        return [warning("launcher", found, "unset SLURM_NTASKS: Lightning takes it for a job that srun has started")]
    if "SLURM_JOB_ID" in env:
        found = f"in Slurm job {env['SLURM_JOB_ID']}, but not started by srun"
        if env.get("SLURM_NTASKS", "1") != "1":
            fix = "srun python train.py; without srun this one process is all there is of the job's tasks"
            return [warning("launcher", f"{found}: SLURM_NTASKS={env['SLURM_NTASKS']} tasks were asked for", fix)]
        return [ok("launcher", f"{found}: python train.py starts the ranks, on this node alone")]
    return [ok("launcher", "none: python train.py starts the ranks")]


def _contradictions(env: Mapping[str, str]) -> list[tuple[str, str]]:
    """What cannot be, and what to do about it."""
    numbers = {name: env[name] for name in (*RANKS, "SLURM_NTASKS", "SLURM_PROCID") if name in env}
    wrong = [
        (f"{name}={value} is no number", f"unset {name}") for name, value in numbers.items() if not value.isdigit()
    ]
    if wrong:
        return wrong
    elastic = "TORCHELASTIC_RUN_ID" in env
    there = [name for name in RANKS if name in env]
    missing = [name for name in (RANKS if elastic else RANKS[:2]) if name not in env]
    if missing and (there or elastic):
        if elastic:
            there = ["TORCHELASTIC_RUN_ID", *there]
        found = f"{', '.join(f'{name}={env[name]}' for name in there)} without {', '.join(missing)}"
        return [(found, f"unset {' '.join(there)}, or start with torchrun, which sets all of them")]
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
    """Slurm's commands, and how many nodes of which partitions would take a job; ``limit`` is seconds for an answer."""
    commands = ("sinfo", "sbatch", "scontrol")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands):
        return [ok("Slurm", "not here")]
    if missing:
        found = f"{', '.join(name for name in commands if name not in missing)}, but no {', '.join(missing)}"
        return [warning("Slurm", found, "install Slurm's client commands, or load their module")]
    try:
        release = _output("sinfo", "--version", limit=limit).strip()
        lines = _output("sinfo", "--noheader", "--Node", "--format=%N|%P|%t", limit=limit).split()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        found = f"sinfo gives no answer: {' '.join(str(said).split())}"
        return [warning("Slurm", found, "see whether slurmctld runs: scontrol ping")]
    fields = [line.split("|") for line in lines]
    nodes = {node: state for node, _, state in fields}
    up = {node for node, state in nodes.items() if state.rstrip("~#%$@^-+!").startswith(UP) and "*" not in state}
    partitions = ", ".join(dict.fromkeys(partition.rstrip("*") for _, partition, _ in fields))
    found = f"{release}: {len(up)} of {len(nodes)} nodes up; partitions {partitions or 'none'}"
    if not up:
        return [warning("Slurm", found, "jobs will wait; sinfo -R says why nodes are down")]
    return [ok("Slurm", found)]


def _output(*command: str, limit: float) -> str:
    done = subprocess.run(command, capture_output=True, check=True, timeout=limit, encoding="utf-8", errors="replace")
    return done.stdout


def wandb(conf: Path = Path("conf/logger/wandb.yaml"), limit: float = 5) -> list[Row]:
    """How W&B would run. The server is asked only where it would be, for ``limit`` seconds at most."""
    mode, told_by = str(WandbConfig().mode), "the default"
    if conf.is_file():
        mode, told_by = str(OmegaConf.select(OmegaConf.load(conf), "mode", default=mode)), str(conf)
    wanted = os.environ.get("WANDB_MODE")
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = _key_place(url)
    found = f"mode {mode} ({told_by}); {f'an API key is in {key}' if key else 'no API key'}"
    if "online" not in (mode, wanted):
        return [ok("W&B", found)]
    say, stay = (failed, "; or keep runs on this machine: logger.mode=offline") if mode == "online" else (warning, "")
    if mode != "online":
        found += "; WANDB_MODE=online is set, but python train.py goes by logger.mode"
    if key is None:
        return [say("W&B", found, f"wandb login{stay}")]
    try:
        _ask(url, limit)
    except OSError as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        found += f"; {url} does not answer within {limit:g} s ({reason})"
        return [say("W&B", found, f"see the network and WANDB_BASE_URL{stay}")]
    found += f"; {url} answers"
    return [ok("W&B", found) if mode == "online" else warning("W&B", found, "python train.py logger.mode=online")]


def _ask(url: str, limit: float) -> None:
    with suppress(urllib.error.HTTPError):  # an answer too
        urllib.request.urlopen(url, timeout=limit).close()


def _key_place(url: str) -> str | None:
    """Where W&B will find a key, and never the key."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    home = Path.home()
    path = Path(os.environ.get("NETRC") or next((p for p in (home / ".netrc", home / "_netrc") if p.exists()), ""))
    try:
        return str(path) if path.is_file() and netrc.netrc(path).authenticators(urlsplit(url).netloc) else None
    except (OSError, netrc.NetrcParseError):
        return None
