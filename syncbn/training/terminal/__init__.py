"""What a run prints: the model line, progress, the metrics of the test, and the copy of it all in ``train.log``."""
