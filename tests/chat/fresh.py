"""Comparing what the chat's caches hold with a fresh computation."""

from __future__ import annotations

from examples.chat.engine import Engine
from examples.chat.reading import compose
from examples.chat.tree import Conversation
from mlx_kvcache.plugin import make_prompt_cache
from tests.plugin.running import difference, logits_of


def tokens_of(engine: Engine, conversation: Conversation) -> list[int]:
    """What the model has read and written of the branch that is looked at."""
    path = conversation.path
    turns = [message.turn for message in path[path[-1].start :]]
    written = turns.pop().piece if turns[-1].role == "assistant" else None
    context = compose(engine.tokenizer, conversation.system, turns)
    return context.tokens + list(written.tokens if written else ())


def difference_to_fresh(engine: Engine, conversation: Conversation) -> tuple[int, float]:
    """How many tokens of the branch are cached, and how far they are from a fresh computation of them."""
    tokens = tokens_of(engine, conversation)
    session = engine.pool.open([*tokens, 0], conversation.salt(conversation.path))
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
