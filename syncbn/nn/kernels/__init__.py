"""The passes over the data: which kernel runs, in C on the CPU, and with Triton on a GPU."""
