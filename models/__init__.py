"""The DNN variants that are served: what each one is, how its input is made and how it runs.

Not here: data classes of other packages, networks of learned policies (`policies/`), queues (`workers/`).
Read `catalog.py` first (what a variant is), then `runtime.py` (how one is run).
"""
