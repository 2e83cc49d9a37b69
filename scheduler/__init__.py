"""The scheduler process: turns observations into decisions, slot by slot and window by window.

Not here: the policies themselves (`policies/`), and nothing that a request waits for.
Read `slot_loop.py` first.
"""
