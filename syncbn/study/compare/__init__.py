"""Compares finished runs: reads run directories, pairs runs, and computes tests, costs and the verdict."""
