"""The `tidegate` command line over all processes: up, demo, replay, compare, models, bench.

Not here: anything that a serving process needs. Read `main.py` first.
"""
