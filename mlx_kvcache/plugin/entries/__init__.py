"""What mlx-lm sees: one object for each entry of a model's cache list.

The classes have the names of mlx-lm's own and answer `state` like them, so that files which mlx-lm writes
load with or without this package. They hold no arrays: they pass calls on to the rows they belong to.
"""
