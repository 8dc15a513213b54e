"""Further evaluations after the test: adapted or precise statistics, corrupted images, the training images."""
