"""The device that computes: the one place where it is asked for, so that tests can give either answer."""

from __future__ import annotations

import mlx.core as mx


def is_cpu() -> bool:
    """Whether MLX computes on a CPU.

    There its attention has no kernel of its own: it repeats the keys for each query head, and multiplies
    keys that the mask hides.
    """
    return mx.default_device().type == mx.cpu
