"""Pictures in the run directory: the curves of training, the confusion matrix, and the worst mistakes of the test."""
