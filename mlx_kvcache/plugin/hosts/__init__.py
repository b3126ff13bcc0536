"""Interface to the host (mlx-lm, mlx-vlm): its cache classes, model calls, attention and files.

Only this package replaces functions and classes of a model. It does not import pools or forwards.
"""
