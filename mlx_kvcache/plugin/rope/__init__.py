"""Finds the RoPE rotation of a model's cached keys and re-bases keys without accumulating errors.

This package does not import pools.
"""
