"""Keys and values as MLX arrays, in float or quantized, by layer and segment.

It must not know sequences: it is told which cells to write, read and move.
"""
