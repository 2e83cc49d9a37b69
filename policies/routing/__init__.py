"""Routing: which instance of a service a request goes to, by rules, by tables and by learned policies (Tan).

Not here: the live slot loop (`scheduler/`) and the device that serves a queue (`workers/`).
Read `contract.py` first (the words and shapes), then `rules.py` (every per-request rule), then `simulator.py`.
"""
