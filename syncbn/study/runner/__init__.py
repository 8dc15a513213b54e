"""``+study=NAME``: composes the cells of a study, runs what is missing, and reports."""
