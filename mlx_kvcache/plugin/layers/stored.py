"""What a conversation's layer holds, in mlx-lm's form."""

from __future__ import annotations

import mlx.core as mx

from ...arrays.lanes import Plain, joined
from ...arrays.pairs import Lanes
from ...arrays.store import Cells, cells_in, concatenated
from ...cells.rules import Chunk
from ...cells.spans import seen_from
from ..conversation import Conversation
from ..layout import Leaf
from ..rotation import rebased


def stored(conversation: Conversation, leaf: Leaf) -> tuple[mx.array, mx.array]:
    """K and V (1, n_kv_heads, S, head_dim) of the newest tokens, as many as mlx-lm would keep.

    At the first token of a chunk there are none, S = 0. Keys are returned at the tokens' own positions,
    whatever the model's offset is.
    """
    pool = conversation.pool
    cells = _kept(conversation, leaf)
    if not cells:
        # After a load the store may not know the layer yet, but the model has been tried.
        form = pool.forms[leaf.index]
        assert form is not None
        return form.decoded(form.zeros(0))
    keys, values = concatenated(pool.keyed(leaf)._store.layers[leaf.index].read(cells))
    lead = conversation.head.lead
    rotation = pool.scheme.rotations[leaf.index] if lead else None
    return rebased(rotation, keys, values, -lead)


def packed(conversation: Conversation, leaf: Leaf) -> Lanes:
    """The same in the bits that the leaf is packed in."""
    buffers = conversation.pool.keyed(leaf)._store.layers[leaf.index]
    if conversation.head.lead:
        keys, values = stored(conversation, leaf)
        return buffers.form.stored((Plain(keys), Plain(values)), is_packed=True)
    pieces = [buffers.form.stored(lanes, True) for lanes in buffers.lanes(_kept(conversation, leaf))]
    return joined([keys for keys, _ in pieces]), joined([values for _, values in pieces])


def buffers_of(conversation: Conversation, leaf: Leaf) -> list[mx.array]:
    """All that is stored of what `stored` returns, as it is."""
    pieces = conversation.pool.keyed(leaf)._store.layers[leaf.index].lanes(_kept(conversation, leaf))
    return [array for piece in pieces for lane in piece for array in lane.arrays]


def _kept(conversation: Conversation, leaf: Leaf) -> list[Cells]:
    cache = conversation.pool.keyed(leaf)
    spans, position = cache._table[conversation.sequence].spans, conversation.position
    if not isinstance(leaf.rule, Chunk):
        # The newest token still sees what the next one pushes out.
        position -= 1
    return cells_in(seen_from(cache._rule, spans, position))
