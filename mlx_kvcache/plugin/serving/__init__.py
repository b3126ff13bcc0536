"""Serves many conversations: continuous batching, session pools, mlx-lm's prompt store and server."""
