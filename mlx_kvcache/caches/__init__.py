"""The caches behind the `Cache` interface, one module for each kind.

Every kind plans a whole change before it makes any part of it. This package must not know models.
"""
