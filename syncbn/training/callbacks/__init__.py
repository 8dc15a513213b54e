"""Lightning callbacks that watch training: statistics, gradients, non-finite values, targets, progress."""
