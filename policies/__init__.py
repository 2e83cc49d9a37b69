"""Decisions: which instance answers a request (`routing/`) and which configuration, variant and node (`placement/`).

Nothing here opens a socket, sleeps or reads a clock: time and randomness are arguments.
Not here: queues and executors (`workers/`), the loops that call these decisions (`gateway/`, `scheduler/`).
Read `policies/routing/rules.py` first.
"""
