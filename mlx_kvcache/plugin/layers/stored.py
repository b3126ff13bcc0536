"""What a conversation's layer holds, as one pair of arrays in mlx-lm's form."""

from __future__ import annotations

import mlx.core as mx

from ...arrays.store import cells_of, concatenated
from ...cells.rules import Chunk
from ...cells.spans import seen_from
from ..conversation import Conversation
from ..layout import Leaf
from ..rotation import rebased


def stored(conversation: Conversation, leaf: Leaf) -> tuple[mx.array, mx.array]:
    """K and V (1, n_kv_heads, S, head_dim) of the newest tokens, as many as mlx-lm would keep.

    Keys are returned at the tokens' own positions, whatever the model's offset is.
    """
    pool = conversation.pool
    cache = pool.keyed(leaf)
    spans, position = cache._table[conversation.sequence].spans, conversation.position
    if not isinstance(leaf.rule, Chunk):
        # The newest token still sees what the next one pushes out.
        position -= 1
    kept = seen_from(cache._rule, spans, position)
    cells = [cells_of(span.segment, span.start, span.stop) for span in kept]
    keys, values = concatenated(cache._store.layers[leaf.index].read(cells))
    lead = conversation.head.lead
    rotation = pool.scheme.rotations[leaf.index] if lead else None
    return rebased(rotation, keys, values, -lead)
