"""The entries of a model's cache list: one object for each layer, with the interface of mlx-lm's caches.

The classes have the names and the `state` of mlx-lm's classes, so that files written by mlx-lm load with or
without this package. Entries hold no arrays: they pass calls on to the rows behind their cache list.
"""
