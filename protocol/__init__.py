"""What two Tidegate processes must agree on: outcomes, frames, links, board records.

Not here: any decision, any model, any HTTP. This package imports nothing of ours and nothing heavy.
Read `outcomes.py` first, then `frames.py`, then `records.py`.
"""
