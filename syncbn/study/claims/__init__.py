"""Tests claims about batch norm with rules that were written before the runs, and reports the verdicts."""
