"""Labelled pictures and clips: scenes that this project renders, and the COCO and MOT17 file formats.

Not here: decoding of what clients send (`models/preprocess.py`, `models/clips.py`), scores, networks.
Read `scenes.py` first (what a scene is and what is true of it), then `coco.py` and `mot.py`.
"""
