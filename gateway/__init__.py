"""The gateway process: HTTP in, one outcome per request out.

Not here: queues and models (workers), learned decisions (scheduler). It decodes no image and runs no model.
Read `handle.py` first: the life of one request.
"""
