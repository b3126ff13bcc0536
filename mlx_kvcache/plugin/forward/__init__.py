"""A model's call: when it begins and ends, for one sequence or the rows of a batch.

It turns calls on layers into plans of a pool. It must not know the classes of entries, or options.
"""
