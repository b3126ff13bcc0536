"""Forwards: when they begin and end, for one sequence or for the rows of a batch.

Turns calls on layers into plans of a pool. Must not import the classes of entries, or options.
"""
