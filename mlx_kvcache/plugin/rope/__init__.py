"""Finds the RoPE rotation of cached keys and re-bases keys without accumulating errors. Knows no pools."""
