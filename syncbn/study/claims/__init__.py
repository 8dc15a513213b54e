"""Claims for batch norm, put to the test: rules written down before the runs, and what the runs say by them."""
