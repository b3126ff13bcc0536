"""K/V buffers, masks and re-basing on MLX arrays. Sequences are unknown here."""
