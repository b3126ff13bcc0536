"""The kinds of cache behind the `Cache` interface.

Each plans a change whole before it commits any of it. They must not know models.
"""
