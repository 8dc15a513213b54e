"""Reports comparisons: as tables, plots, HTML, Markdown, terminal output and W&B runs."""
