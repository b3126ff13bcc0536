"""Lets prompts of mlx-vlm's server keep what they share with a stored one, wherever it moved.

mlx-vlm computes the end of a prompt, from a position on. So the tokens of a spliced prompt change their
order: first come those that the cache has or will join, then those to compute. This is done for a prompt of
text that is read alone, since the rows of a batch would have to stop at the same tokens.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_vlm.generate.ar import BatchGenerator

from ...sessions.session import Session
from ...sessions.splicing import Splicing
from ..pool.splice import to_compute
from .mlx_lm_splice import splicing

original_build = BatchGenerator._build_mixed_prompt_batch

_alone: weakref.WeakSet[Any] = weakref.WeakSet()
"""The generators that are building a batch of one prompt."""


def build_mixed_prompt_batch(self: Any, sequences: list[tuple[Any, ...]]) -> Any:
    """Replaces `BatchGenerator._build_mixed_prompt_batch`: a prompt that is read alone may be spliced."""
    prompts = [list(sequence[1]) for sequence in sequences]
    if len(sequences) == 1:
        _alone.add(self)
    try:
        batch = original_build(self, sequences)
    finally:
        _alone.discard(self)
    for about, tokens in zip(getattr(batch, "_apc_meta", ()), prompts, strict=False):
        # In the order in which it is stored.
        about["full_input_ids"] = tokens
    return batch


def splicing_of(generator: Any, n: int, inputs: dict[str, Any]) -> Splicing | None:
    """Return how a prompt of n tokens may be spliced, or None.

    Of its inputs, only the embeddings may have a part for each token: positions would not be known.
    """
    chosen = splicing.get(getattr(generator.model, "language_model", generator.model))
    aligned = {name for name, value in inputs.items() if isinstance(value, mx.array) and n in value.shape[1:]}
    is_text = aligned <= {"inputs_embeds"} and getattr(generator, "draft_model", None) is None
    return chosen[0] if chosen and is_text and generator in _alone else None


def order_of(session: Session) -> list[int]:
    """Return the positions of a spliced prompt's tokens, those to compute last."""
    conversation = session.cache._conversation
    # What was taken from a spliced cache is spliced, even if it is only its beginning.
    conversation.text = tuple(session.tokens)
    rest = [i for piece in to_compute(conversation) for i in piece]
    logging.info("kept %d of %d prompt tokens after a change", session.reused, len(session.tokens))
    return [*sorted({*range(len(session.tokens))}.difference(rest)), *rest]


def reorder(tokens: list[int], inputs: dict[str, Any], order: Sequence[int]) -> None:
    """Put a prompt's tokens and their embeddings into another order, in place."""
    tokens[:] = [tokens[i] for i in order]
    inputs["inputs_embeds"] = inputs["inputs_embeds"][:, mx.array(list(order))]
