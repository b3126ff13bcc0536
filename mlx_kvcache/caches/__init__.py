"""The kinds of cache. Each plans a change whole before it commits any of it."""
