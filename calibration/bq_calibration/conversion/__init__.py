"""Checkpoints of other packages brought into the format without requantizing: every weight stays the same number.

One module per source format; `source.py` is what they have in common.
"""
