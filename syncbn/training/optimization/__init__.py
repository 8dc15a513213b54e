"""What is done to the weights beside the optimizer's step: averages of them, early stopping, the search for a rate."""
