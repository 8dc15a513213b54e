"""Reads finished runs and compares them: pairs, statistics, plots, a report. The top floor.

Bottom up: ``runs`` (what a run directory says), ``settings``, ``labels`` and ``sides`` (what tells runs apart),
``metrics`` (what they are compared by), ``pairing`` (which belong together), ``effects`` (the statistics of pairs),
``costs``, ``layers``, ``facts`` and ``published`` (what else there is to say), ``answer`` (the answer), ``comparing``
(all of it, from paths to a ``comparison``), ``terminal``, ``plots`` and ``report`` (what is shown of it). Studies make
runs and then compare them: ``plan`` (which), ``studies`` (how), ``pages`` (their report).
"""
