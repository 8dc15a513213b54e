"""Reads run directories and compares them: pairs, tests, costs and the verdict."""
