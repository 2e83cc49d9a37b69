"""The load generator: replays request times against any gateway over HTTP, scores the answers, reports them.

Not here: anything of the serving system. It is an outsider that knows only HTTP, the JSON answer and the
status codes; of this project it imports `policies/routing/workload.py` (what an arrival process is) and
nothing else. Read `sender.py` first (the open loop), then `score.py`, then `report.py`.
"""
