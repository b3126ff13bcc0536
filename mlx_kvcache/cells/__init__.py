"""Bookkeeping: which sequence owns which cell, where new tokens go, and who sees whom.

Pure Python on ints and tuples. It must not know MLX, arrays or models.
"""
