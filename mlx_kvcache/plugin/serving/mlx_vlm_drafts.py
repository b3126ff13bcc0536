"""Speculative decoding of mlx-vlm on these caches: rejected tokens are dropped, row by row.

mlx-vlm records what a block of drafted tokens writes, so that it can take back a part. These caches go back
without a record: each row rewinds to the last token that was accepted. Drafted tokens are verified by
ordinary calls of the model. Drafters of the kinds eagle3 and mtp are refused: mlx-vlm verifies theirs by
parts of the model, which these caches do not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_vlm.speculative import cache_state, common, dflash, drafters, utils

from ...errors import NotSupportedError
from ..forward.batch_rows import Rows
from ..hosts.observe import is_cache
from .mlx_vlm_batch import empty_rows

original_start = cache_state.start_speculative_cache
original_verify = dflash._dflash_verify
original_verify_greedy = dflash._dflash_verify_greedy
original_make_cache = utils.make_speculative_prompt_cache
original_validate = drafters.validate_drafter_compatibility


class DraftNotSupportedError(NotSupportedError, ValueError):
    """A drafter is of a kind that does not run on these caches. mlx-vlm's server goes on without it."""


def check_kind(kind: str | None) -> None:
    """Raises DraftNotSupportedError for kinds of drafters that do not run on these caches."""
    if kind != "dflash":
        raise DraftNotSupportedError(
            f"drafters of kind {kind} are not supported on these caches; use one of kind dflash, generate "
            "without a drafter, or detach the model"
        )


def validate_drafter_compatibility(target_model: Any, draft_model: Any, draft_kind: str) -> None:
    """Replaces `validate_drafter_compatibility`: also refuses kinds that these caches do not support."""
    original_validate(target_model, draft_model, draft_kind)
    if empty_rows(getattr(target_model, "language_model", target_model)):
        check_kind(draft_kind)


def make_speculative_prompt_cache(language_model: Any, *, draft_kind: str, **kwargs: Any) -> list[Any]:
    """Replaces `make_speculative_prompt_cache`: also refuses kinds that these caches do not support."""
    cache: list[Any] = original_make_cache(language_model, draft_kind=draft_kind, **kwargs)
    if is_cache(cache):
        check_kind(draft_kind)
    return cache


class Round(cache_state.SpeculativeCacheTransaction):  # type: ignore[misc]
    """A block of drafted tokens that is about to be verified."""

    def __init__(self, rows: Rows, length: int) -> None:
        super().__init__([], {}, (), length)
        self._rows = rows
        self._begins = rows.positions

    def commit(self, lengths: Any) -> None:
        """Keep the first tokens of the block, as many of each row as `lengths` says."""
        listed = _listed(lengths)
        self._end(listed * len(self._begins) if len(listed) == 1 else listed)

    def abort(self) -> None:
        """Drop the block, unless it is committed."""
        if self._active:
            self._end([0] * len(self._begins))

    def _end(self, lengths: Sequence[int]) -> None:
        ends = [begin + length for begin, length in zip(self._begins, lengths, strict=True)]
        if ends != self._rows.positions:
            self._rows.rewind_to(ends)
        self._active = False


def start_speculative_cache(caches: Any, length: int, cache_types: tuple[Any, ...] | None = None) -> Any:
    """Replaces `start_speculative_cache`: begins a block on an attached model's cache."""
    listed = list(caches)
    if is_cache(listed):
        return Round(listed[0].rows, length)
    return original_start(listed, length, cache_types)


def dflash_verify(lm: Any, inputs: mx.array, cache: Any, capture_layer_ids: Sequence[int]) -> Any:
    """Replaces `_dflash_verify`: calls the model as for any other tokens."""
    if is_cache(cache):
        return common.verify_forward(lm, inputs, cache, capture_layer_ids=capture_layer_ids)
    return original_verify(lm, inputs, cache, capture_layer_ids)


def dflash_verify_greedy(
    lm: Any, verify_input: mx.array, prompt_cache: Any, target_layer_ids: Sequence[int], sampler: Any
) -> Any:
    """Replaces `_dflash_verify_greedy`: calls the model as for any other tokens."""
    if not is_cache(prompt_cache):
        return original_verify_greedy(lm, verify_input, prompt_cache, target_layer_ids, sampler)
    output, state = dflash_verify(lm, verify_input, prompt_cache, target_layer_ids)
    return output.hidden_states, state, sampler(output.logits)


def _listed(numbers: Any) -> list[int]:
    if isinstance(numbers, mx.array):
        numbers = numbers.reshape(-1).tolist()
    return [numbers] if isinstance(numbers, int) else [int(number) for number in numbers]
