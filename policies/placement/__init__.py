"""Placement: which configuration, variant and node serve each edge request of a window (Huang's problem).

What it is: the network and cost model (`edge_network.py`), decision makers (`rules.py`, `exact.py`, the learned
`hisper.py`, `hasac.py`, `happo.py` and their numpy `actors.py`), and their scores (`evaluate.py`).
What it is not: it opens no socket, reads no clock and moves no image; the live parts do that.
Read `contract.py` first, then `edge_network.py`.
"""
