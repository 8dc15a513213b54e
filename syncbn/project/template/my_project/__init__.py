"""The code of this project: a network and data."""
