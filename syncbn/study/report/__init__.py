"""Reports of comparisons: tables, plots, HTML, Markdown, terminal and W&B."""
