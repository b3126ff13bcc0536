"""Lets requests to mlx-lm's server keep what their prompts share with a stored one, wherever it moved.

A request is given a cache that waits for the runs to join (see `PromptCache.splice`) and computes only the
other tokens. mlx-lm takes these for the end of the prompt, so its record of a cache's tokens is corrected
when the cache is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from ...sessions.splicing import Splicing, best_splice, spliced_salt
from ..forward.batch_rows import Rows
from ..hosts.observe import PerModel
from ..pool.conversation import Conversation
from ..prompt_cache import PromptCache

splicing: PerModel[list[Splicing]] = PerModel(list)
"""How prompts of a model are spliced. Empty: not at all."""


class Stored(NamedTuple):
    """A stored conversation."""

    tokens: Sequence[int]
    cache: PromptCache


def set_splicing(model: nn.Module, min_run: int, recompute: float) -> None:
    """Choose how prompts of a model are spliced; a min_run of 0 ends it."""
    splicing.of(model)[:] = [Splicing(min_run, recompute)] if min_run else []


def keys_of(model: Hashable) -> tuple[Hashable, Hashable]:
    """Return the keys with which a store holds exact caches of a model, and spliced ones."""
    return model, spliced_salt(model)


def stored(tokens: Sequence[int], rows: Rows) -> Stored:
    """Return a conversation of a store. Its cache may lack the last tokens, which were never fed."""
    return Stored(tokens[: rows.positions[0]], PromptCache(rows))


def fetch_spliced(
    candidates: Sequence[Stored], tokens: Sequence[int], kept: int
) -> tuple[list[Any], list[int]] | None:
    """Return a cache that goes on to a prompt and the tokens to compute, if that saves enough.

    Args:
        candidates: stored conversations of one model, the likeliest first.
        kept: the number of tokens that are reused without a splice.
    """
    living = candidates[0].cache.pool.model if candidates else None
    chosen = splicing.get(living) if living is not None else None
    if not chosen:
        return None
    found, refusal = best_splice(candidates, tokens, chosen[0], kept + chosen[0].min_run - 1)
    if refusal:
        logging.info("tokens after a change of the prompt are not kept: %s", refusal)
    if found is None:
        return None
    plan, cache = found.plan, found.cache
    # What was taken from a spliced cache is spliced, even if it is only its beginning.
    cache._conversation.text = tuple(tokens)
    logging.info(
        "Reused %d of %d tokens by a splice: %d of them moved, %d are computed",
        *(plan.kept, len(tokens), plan.moved, len(plan.rest)),
    )
    return cache, plan.rest


def recorded(
    conversation: Conversation, model: Hashable, tokens: Sequence[int]
) -> tuple[Hashable, list[int]]:
    """Return the key and the tokens of a cache, given those that mlx-lm has recorded for it."""
    text = conversation.text
    if text is None:
        return model, list(tokens)
    # A prompt that is under way lacks what has joined.
    is_read = len(tokens) >= len(text)
    found = [*text, *tokens[len(text) :]] if is_read else list(text[: conversation.position])
    return spliced_salt(model), found
