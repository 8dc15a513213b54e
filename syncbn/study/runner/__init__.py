"""Executes ``+study=NAME``: composes the runs of a study, executes missing runs, and writes the report."""
