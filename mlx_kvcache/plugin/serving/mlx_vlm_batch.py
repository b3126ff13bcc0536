"""Batches of mlx-vlm's `BatchGenerator` on these caches, and its options for quantization.

mlx-vlm makes the caches of a batch itself, of classes of its own for batches. For an attached model these
functions make a batch of this package's caches instead, join batches, and limit replies to the capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_vlm.generate import ar, common
from mlx_vlm.kv_quant import from_legacy
from mlx_vlm.models import cache as mlx_vlm_cache

from ...errors import NotSupportedError
from ..cache_options import Storage, quantization_of
from ..entries.nested import entries_of
from ..forward.batch_rows import Rows
from ..hosts.observe import is_cache

original_make_cache = ar._make_cache
original_extend = ar._extend_cache
original_quantize = common.maybe_quantize_kv_cache
original_insert = ar.BatchGenerator.insert


def rows_of(cache: Any) -> Rows | None:
    """The rows behind a cache list of this package; None for others."""
    return cache[0].rows if is_cache(cache) else None


def fresh(model: Any) -> list[Any]:
    """An empty cache list of a model: of this package if the model is attached."""
    made: list[Any] = mlx_vlm_cache.make_prompt_cache(model)
    return made


def empty_rows(model: Any) -> Rows | None:
    """The rows of an empty cache of an attached model; None for others."""
    return rows_of(fresh(model)) if isinstance(model, nn.Module) else None


def make_cache(
    model: Any, left_padding: Sequence[int], kv_bits: float | None = None, *args: Any, **kwargs: Any
) -> list[Any]:
    """Replaces `_make_cache`: makes the caches of a batch that is padded on the left.

    Raises NotSupportedError if the keys and values cannot be quantized as `kv_bits` and its like ask.
    """
    rows = empty_rows(model)
    if rows is None:
        theirs: list[Any] = original_make_cache(model, left_padding, kv_bits, *args, **kwargs)
        return theirs
    quantize(rows, kv_bits, *args, **kwargs)
    batch = merged(entries_of(rows), count=len(left_padding))
    if any(left_padding):
        for entry in batch:
            entry.prepare(left_padding=left_padding)
    return batch


def merged(*caches: list[Any], count: int = 1) -> list[Any]:
    """A batch of forks of the rows of these cache lists, `count` forks of each."""
    return [entries[0].merge(list(entries) * count) for entries in zip(*caches, strict=True)]


def extend_cache(cache: list[Any], other: list[Any]) -> list[Any]:
    """Replaces `_extend_cache`: also joins a cache of one conversation, which is not a batch yet."""
    rows = rows_of(cache)
    if rows is None or not other:
        joined: list[Any] = original_extend(cache, other)
        return joined
    if not rows.is_batch:
        return merged(cache, other)
    for entry, more in zip(cache, other, strict=True):
        entry.extend(more)
    return cache


def maybe_quantize_kv_cache(
    prompt_cache: list[Any],
    quantized_kv_start: int,
    kv_group_size: int,
    kv_bits: float | None,
    kv_quant_scheme: str = common.DEFAULT_KV_QUANT_SCHEME,
    kv_key_bits: float | None = None,
    kv_value_bits: float | None = None,
    kv_key_scheme: str | None = None,
    kv_value_scheme: str | None = None,
) -> None:
    """Replaces `maybe_quantize_kv_cache`: quantizes all layers once the cache is long enough.

    Raises NotSupportedError if the keys and values cannot be quantized as asked.
    """
    split = kv_key_bits, kv_value_bits, kv_key_scheme, kv_value_scheme
    rows = rows_of(prompt_cache)
    if rows is None:
        given = kv_quant_scheme, *split
        original_quantize(prompt_cache, quantized_kv_start, kv_group_size, kv_bits, *given)
    elif kv_bits is not None:
        bits = _bits(kv_bits, kv_quant_scheme, kv_group_size, *split)
        if rows.pool.quantization is None and max(rows.positions) >= quantized_kv_start:
            _quantize(rows, Storage(bits, kv_group_size))
            prompt_cache[:] = entries_of(rows)


def quantize(
    rows: Rows,
    kv_bits: float | None,
    kv_key_bits: float | None = None,
    kv_value_bits: float | None = None,
    kv_key_scheme: str | None = None,
    kv_value_scheme: str | None = None,
    kv_group_size: int = 64,
    kv_quant_scheme: str = common.DEFAULT_KV_QUANT_SCHEME,
    **_: Any,
) -> None:
    """Quantize empty rows as mlx-vlm's batches do: from the first token on, but not the last layer.

    Raises NotSupportedError if the keys and values cannot be quantized as asked.
    """
    if kv_bits is None:
        return
    split = kv_key_bits, kv_value_bits, kv_key_scheme, kv_value_scheme
    bits = _bits(kv_bits, kv_quant_scheme, kv_group_size, *split)
    count = len(rows.pool.layout.entries)
    in_float = [i for i in range(count) if not mlx_vlm_cache.should_quantize_kv_layer(i, count)]
    _quantize(rows, Storage(bits, kv_group_size, in_float))


def _quantize(rows: Rows, storage: Storage) -> None:
    quantization = quantization_of(rows.pool, storage)
    if quantization is not None:
        rows.quantize(quantization)


def _bits(
    kv_bits: float,
    scheme: str,
    group_size: int,
    key_bits: float | None,
    value_bits: float | None,
    key_scheme: str | None,
    value_scheme: str | None,
) -> Any:
    """The widths of keys and values. Raises NotSupportedError if they are not quantized uniformly."""
    policy = from_legacy(kv_bits, scheme, group_size, key_bits, value_bits, key_scheme, value_scheme)
    assert policy is not None
    widths = policy.key.bits, policy.value.bits
    if policy.key.is_turboquant or policy.value.is_turboquant or any(width % 1 for width in widths):
        raise NotSupportedError(
            f"kv_bits={kv_bits:g} asks for the quantization scheme turboquant, which these caches do not "
            "have; use 8, 6, 5, 4, 3 or 2 bits and the scheme uniform, such as kv_bits=4, or detach the model"
        )
    keys, values = map(int, widths)
    return keys if keys == values else (keys, values)


def asked(generator: Any) -> dict[str, Any]:
    """The options for quantization of a `BatchGenerator`, which `quantize` takes."""
    names = ("bits", "key_bits", "value_bits", "key_scheme", "value_scheme", "group_size", "quant_scheme")
    return {f"kv_{name}": getattr(generator, f"kv_{name}") for name in names}


def insert(self: Any, *args: Any, **kwargs: Any) -> list[int]:
    """Replaces `BatchGenerator.insert`: inserts no prompt unless all fit the capacity.

    With overflow="error", `max_tokens` is lowered to the room that the prompt leaves.

    Raises:
        CacheFullError: a prompt and one token of its reply exceed the capacity.
        NotSupportedError, ValueError: the keys and values cannot be quantized as the generator's options ask.
    """
    before = self._unprocessed_sequences
    # mlx-vlm's own function adds to this list in place, then sorts a copy.
    self._unprocessed_sequences = list(before)
    try:
        uids: list[int] = original_insert(self, *args, **kwargs)
        rows = empty_rows(self.model)
        if rows is not None:
            quantize(rows, **asked(self))
            self._unprocessed_sequences = [
                (uid, prompt, min(most, rows.conversation.reply_room(len(prompt))), *more)
                if uid in uids
                else (uid, prompt, most, *more)
                for uid, prompt, most, *more in self._unprocessed_sequences
            ]
        return uids
    except BaseException:
        self._unprocessed_sequences = before
        raise
