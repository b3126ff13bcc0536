"""One forward pass over a batch: stores its keys and values, and computes attention.

Binds the plans of `cells` to the buffers of `storage`. Independent of kinds of cache and of models.
"""
