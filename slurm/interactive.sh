#!/usr/bin/env bash
# A shell in an allocation, to try things in:  slurm/interactive.sh [salloc's options]
# In it  srun .venv/bin/python train.py [settings]  runs on all of it, and  exit  gives it back.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh
exec salloc --job-name=interactive --nodes=1 --ntasks-per-node=2 --time=01:00:00 "$@"
