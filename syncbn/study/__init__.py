"""Reads finished runs and compares them: pairs, statistics, plots, a report. The top floor.

Bottom up: ``runs`` (what a run directory says), ``pairing`` (which runs belong together), ``effects`` (the statistics
of pairs), ``comparison`` (all that follows, as tables), ``terminal``, ``plots`` and ``report`` (what is shown of it).
"""
