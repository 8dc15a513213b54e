# shellcheck shell=bash disable=SC2034  # PYTHON is for the scripts that source this file
# What your cluster wants. Sourced by every script in here, in the job; source it in your shell too, before sbatch, for
# the lines that sbatch and salloc read:  source slurm/site.sh && sbatch slurm/train.sbatch
# A line that you do not need stays a comment.

# export SBATCH_PARTITION=gpu SALLOC_PARTITION=gpu       # where jobs go
# export SBATCH_ACCOUNT=mine SALLOC_ACCOUNT=mine         # who pays
# module load cuda                                       # what a node needs before Python
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between nodes, if the default is not it

# What runs train.py on a node, from the directory that you submit in; in a container, say
# PYTHON=(apptainer exec --nv image.sif python)
PYTHON=("${SYNCBN_PYTHON:-.venv/bin/python}")
