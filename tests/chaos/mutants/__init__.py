"""Broken builds: each module is the chaos app with one thing of the package taken away.

A worker started with one of them is broken, and nothing else is. What widens a race, so that a short run meets
it, is done to the sound build too (`widened`), which has to pass.
"""
