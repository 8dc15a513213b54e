# shellcheck shell=bash disable=SC2034  # PYTHON is for the scripts that source this file
# Settings of your cluster. Every script in this folder sources this file in the job. For the variables that sbatch and
# salloc read, source it in your shell before you submit:  source slurm/site.sh && sbatch slurm/train.sbatch
# Remove the comment sign of the lines that you need.

# export SBATCH_PARTITION=gpu SALLOC_PARTITION=gpu       # partition of the jobs
# export SBATCH_ACCOUNT=mine SALLOC_ACCOUNT=mine         # account that is charged
# module load cuda                                       # modules that a node has to load before Python
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # network interface between nodes, if the default is wrong

# The command that runs train.py on a node, relative to the directory of submission. In a container, for example:
# PYTHON=(apptainer exec --nv image.sif python)
PYTHON=("${SYNCBN_PYTHON:-.venv/bin/python}")
