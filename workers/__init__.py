"""The worker process: hosts instances (one variant and one bounded queue each) on one device.

Not here: which instance a request goes to (gateway), which variants should be loaded (the board's deployment).
Read `instance.py` first, then `host.py` (the executor that instances share), then `server.py`.
"""
