"""The tests, which are run several files at a time."""

import os

# One thread each. A second one takes a core that another test is at, and the first waits for it in each operation,
# turning in circles: a training in one process took eight times the CPU. What a test says of threads, it sets itself.
os.environ["OMP_NUM_THREADS"] = "1"
# A run of train.py draws no pictures unless the test asks for them (plots=true): half a second less.
os.environ["SYNCBN_PLOTS"] = "false"
