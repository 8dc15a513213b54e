#!/usr/bin/env bash
# Opens a shell in an allocation, for experiments:  slurm/interactive.sh [options of salloc]
# In this shell,  srun .venv/bin/python train.py [settings]  runs on the whole allocation, and  exit  releases it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh
exec salloc --job-name=interactive --nodes=1 --ntasks-per-node=2 --time=01:00:00 "$@"
