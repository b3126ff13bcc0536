"""Bookkeeping of cells: owners, placement of new tokens, removal, and visibility.

Pure Python on ints and tuples, independent of MLX, arrays and models.
"""
