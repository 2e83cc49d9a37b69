"""Network definitions in torch, for training and export only: serving runs the exported files.

Not here: how a file is run (`models/runtime.py`). Read `digits.py` first.
"""
