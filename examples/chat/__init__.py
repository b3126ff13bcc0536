"""A terminal chat that reuses its caches, so that no token is prefilled twice."""
