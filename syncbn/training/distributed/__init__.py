"""A rank among others: its launcher, the store, Slurm, DistributedDataParallel, signals, unresponsive ranks."""
