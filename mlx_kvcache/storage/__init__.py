"""Keys and values as MLX arrays, in float or quantized, by layer and segment.

Independent of sequences: callers say which cells to write, read and copy.
"""
