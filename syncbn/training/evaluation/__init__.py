"""The test, repeated: with adapted or precise statistics, corrupted, or on the training images."""
