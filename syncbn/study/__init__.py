"""Runs studies, compares finished runs pair by pair, tests claims, and writes reports.

Bottom up: ``cells`` lists the runs of a study and ``format`` formats numbers. ``compare`` reads run directories, pairs
runs and computes tests, costs and the verdict. ``report`` shows a comparison as tables, plots, HTML, Markdown and
terminal output. ``claims`` tests claims of papers by rules that were written before the runs. ``runner`` executes a
study and writes its report. A folder imports only the folders before it in this list.
"""
