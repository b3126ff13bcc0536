"""One forward pass over a batch: where its keys and values go, and how its tokens attend.

It binds the plans of `cells` to the buffers of `storage`. It must not know kinds of cache or models.
"""
