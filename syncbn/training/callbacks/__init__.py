"""Lightning callbacks that monitor training: statistics, gradients, non-finite values, targets and progress."""
