"""The oracle for removals of the oldest tokens: a cache that drops them by hand, and leaves the others."""

from __future__ import annotations

from typing import Any

import mlx.core as mx


class Forgetful:
    """The keys and values of the newest tokens. Offsets go on when older ones are forgotten."""

    def __init__(self) -> None:
        self.offset = 0
        self.pair: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.offset += keys.shape[2]
        new = [keys, values]
        before = self.pair or [array[:, :, :0] for array in new]
        self.pair = [mx.concatenate([*own], axis=2) for own in zip(before, new, strict=True)]
        return self.pair[0], self.pair[1]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.pair[0], self.pair[1]

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        return self.keys_and_values()

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        held = self.pair[0].shape[2] if self.pair else 0
        return mx.arange(held + n)[None] <= held + mx.arange(n)[:, None]

    def forget(self, n: int) -> None:
        self.pair = [array[:, :, n:] for array in self.pair]
