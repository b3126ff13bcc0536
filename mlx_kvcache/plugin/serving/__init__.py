"""Many conversations at once: continuous batching, prefix caches, and mlx-lm's server."""
