"""Comparing what the chat's caches hold with a fresh computation."""

from __future__ import annotations

from examples.chat.engine import Engine
from examples.chat.prompt import SPLICE, remembered
from examples.chat.tree import Conversation
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of


def tokens_of(engine: Engine, conversation: Conversation) -> list[int]:
    """What the model has read and written of the branch that is looked at."""
    return remembered(engine.tokenizer, conversation)[1]


def difference_to_fresh(engine: Engine, conversation: Conversation) -> tuple[int, float]:
    """How many tokens of the branch are cached, and how far they are from a fresh computation of them."""
    context, tokens = remembered(engine.tokenizer, conversation)
    splice = SPLICE if context.is_changed else 0
    session = engine.pool.open([*tokens, 0], conversation.salt(conversation.path), splice=splice)
    probe = tokens[:2]
    held = min(session.reused, (engine.settings.capacity or len(tokens) + 2) - len(probe))
    session.cache.rewind_to(held)
    ours = logits_of(engine.model, session.cache, probe)
    settings = engine.settings
    fresh = make_prompt_cache(engine.model, kv_bits=settings.bits)
    theirs = logits_of(engine.model, fresh, tokens[:held] + probe)[-2:]
    session.cache.rewind(len(probe))
    session.close()
    return session.reused, difference(ours, theirs)
