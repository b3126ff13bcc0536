"""Patches mlx-vlm's tools while a model is attached.

Batches, the prefix cache and the server have modules of their own. Here a chat goes on from the cache of its
last turn, a `PromptCacheState`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from mlx_vlm import apc
from mlx_vlm.generate import dispatch
from mlx_vlm.generate.ar import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_vlm.generate.common import PromptCacheState
from mlx_vlm.server.generation import ResponseGenerator

from . import (
    mlx_vlm_batch,
    mlx_vlm_drafts,
    mlx_vlm_media,
    mlx_vlm_server,
    mlx_vlm_splice,
    mlx_vlm_store,
)
from .mlx_vlm_batch import rows_of

_KEY = "_key_of_mlx_kvcache"
"""Attribute of a `PromptCacheState`: the salt and the key of the conversation in it."""


def update(self: Any, token_ids: list[int], kv_cache: list[Any]) -> None:
    """Replaces `PromptCacheState.update`: also notes which pictures the conversation has."""
    _originals[PromptCacheState, "update"](self, token_ids, kv_cache)
    rows = rows_of(kv_cache)
    request = mlx_vlm_media.answered(rows) if rows else None
    key = request.keys(token_ids) if request else None
    setattr(self, _KEY, (request.salt, key) if request and key else None)


def find_prefix_length(self: Any, new_ids: list[int]) -> int:
    """Replaces `PromptCacheState.find_prefix_length`: finds the newest position to resume from.

    Text and pictures before it must be the same, and at least one token is left to compute.
    """
    rows, (salt, key) = rows_of(self.cache), getattr(self, _KEY, None) or (0, [])
    if rows is None:
        found: int = _originals[PromptCacheState, "find_prefix_length"](self, new_ids)
        return found
    request = mlx_vlm_media.noted(new_ids)
    if request is None or request.salt != salt or rows.conversation.gaps:
        return 0
    pairs = zip(key, request.key[:-1], strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    point = rows.resume_point(request.before(min(common, rows.positions[0])))
    while (before := request.before(point)) < point:
        point = rows.resume_point(before)
    return point


def prefix_cache_trim_amount(kv_cache: list[Any], prefix_len: int) -> int | None:
    """Replaces `_prefix_cache_trim_amount`: how many tokens to drop to get back to a position."""
    rows = rows_of(kv_cache)
    if rows is None:
        theirs: int | None = _original_trim_amount(kv_cache, prefix_len)
        return theirs
    return max(0, rows.positions[0] - prefix_len)


_original_trim_amount = dispatch._prefix_cache_trim_amount

FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "_make_cache": (mlx_vlm_batch.original_make_cache, mlx_vlm_batch.make_cache),
    "_extend_cache": (mlx_vlm_batch.original_extend, mlx_vlm_batch.extend_cache),
    "maybe_quantize_kv_cache": (mlx_vlm_batch.original_quantize, mlx_vlm_batch.maybe_quantize_kv_cache),
    "_prefix_cache_trim_amount": (_original_trim_amount, prefix_cache_trim_amount),
    "_prepare_generation_inputs": (mlx_vlm_media.original_prepare, mlx_vlm_media.prepare_generation_inputs),
    "generate_step": (mlx_vlm_media.original_step, mlx_vlm_media.generate_step),
    "semantic_extra_hash": (mlx_vlm_media.original_hash, mlx_vlm_media.semantic_extra_hash),
    "classify_layer_for_apc": (mlx_vlm_store.original_classify, mlx_vlm_store.classify_layer),
    "start_speculative_cache": (mlx_vlm_drafts.original_start, mlx_vlm_drafts.start_speculative_cache),
    "make_speculative_prompt_cache": (
        mlx_vlm_drafts.original_make_cache,
        mlx_vlm_drafts.make_speculative_prompt_cache,
    ),
    "_dflash_verify": (mlx_vlm_drafts.original_verify, mlx_vlm_drafts.dflash_verify),
    "_dflash_verify_greedy": (mlx_vlm_drafts.original_verify_greedy, mlx_vlm_drafts.dflash_verify_greedy),
    "validate_drafter_compatibility": (
        mlx_vlm_drafts.original_validate,
        mlx_vlm_drafts.validate_drafter_compatibility,
    ),
    "APCCoordinator": (mlx_vlm_store.APCCoordinator, mlx_vlm_store.coordinator),
}
"""Functions of mlx-vlm that modules import by name, each with its replacement."""

_PATCHES: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (BatchGenerator, "insert", mlx_vlm_batch.insert),
    (BatchGenerator, "_apc_extra_hash", mlx_vlm_store.extra_hash),
    (BatchGenerator, "_apc_pick_for", mlx_vlm_store.pick_for),
    (BatchGenerator, "_build_mixed_prompt_batch", mlx_vlm_splice.build_mixed_prompt_batch),
    (PromptProcessingBatch, "generate", mlx_vlm_store.generate),
    (PromptProcessingBatch, "remove", mlx_vlm_store.remove),
    (GenerationBatch, "_step", mlx_vlm_store.step),
    (GenerationBatch, "extend", mlx_vlm_store.extend),
    (GenerationBatch, "filter", mlx_vlm_store.filter_rows),
    (apc.APCManager, "clear", mlx_vlm_store.clear),
    (apc.APCManager, "close", mlx_vlm_store.close),
    (apc.APCManager, "stats_snapshot", mlx_vlm_store.stats_snapshot),
    (ResponseGenerator, "_initialize_model", mlx_vlm_server.initialize_model),
    (ResponseGenerator, "_preprocess_request", mlx_vlm_server.preprocess_request),
    (ResponseGenerator, "generate", mlx_vlm_server.generate),
    (ResponseGenerator, "validate_context_budget", mlx_vlm_server.validate_context_budget),
    (PromptCacheState, "update", update),
    (PromptCacheState, "find_prefix_length", find_prefix_length),
)
_originals: dict[tuple[type, str], Callable[..., Any]] = {
    (cls, name): getattr(cls, name) for cls, name, _ in _PATCHES
}


def patch(is_attached: bool) -> None:
    """Replace mlx-vlm's functions while a model is attached, and restore its own otherwise."""
    for cls, name, function in _PATCHES:
        setattr(cls, name, function if is_attached else _originals[cls, name])
