"""Cascade attention: reads a prefix that several sequences share once, without copying it.

All queries of these sequences attend to the shared cells in one product, and to their own cells in a smaller
product for each sequence. The two outputs are merged by the sums of their exponentials, as in FlashAttention
(arXiv 2205.14135) for blocks of keys, and in Hydragen (arXiv 2402.05099) for shared prefixes. Also avoids
copies for a single sequence whose keys lie in several places.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from ..cells.spans import Span, Spans, clip
from ..storage.buffers import Lanes
from .part import Attending, Part, take
from .products import scores_of, weighted_sum
from .step import Step

LONG = 256
"""The number of keys not copied or read again from which cascade attention is faster."""


class Shared(NamedTuple):
    """A run of cells that all queries of its members see completely.

    Each member is a sequence's part, and the cells after the shared ones that it sees.
    """

    run: Span
    members: list[tuple[Part, Spans]]


def shared_runs(step: Step) -> list[Shared]:
    """Returns the runs of cells for which cascade attention is faster."""
    groups: dict[tuple[int, int, int], list[Part]] = {}
    for part in step.apart:
        if part.cells and not step.later and step.rule.lower(part.end - 1) <= part.ranges[0][0]:
            # All its queries see all its earlier keys.
            groups.setdefault(part.cells[0][:3], []).append(part)
    found = []
    for (segment, start, position), parts in groups.items():
        # The run ends before the new keys, so that the mask of the rest is a plain causal one.
        end = min(min(part.cells[0].end, part.begin) for part in parts)
        size = end - position
        copied = sum(len(part.ranges) > 1 for part in parts)
        if size > 0 and size * max(copied, len(parts) - 1) >= LONG:
            members = [(part, clip(part.cells, end)) for part in parts]
            found.append(Shared(Span(segment, start, position, size), members))
    return found


def attend_shared(step: Step, layer: int, shared: Shared, given: Attending) -> list[mx.array]:
    """Returns the output of each member, (1, n_heads, its number of tokens, value_dim)."""
    groups = step.store.layers[layer].form.heads
    run = step.stored(layer, (shared.run,))
    queries = [take(given.queries, part.rows) * given.scale for part, _ in shared.members]
    together = mx.concatenate(queries, axis=2) if len(queries) > 1 else queries[0]
    run_out, run_sum = _attend(together, run, groups, causal=False)
    outputs, start = [], 0
    for (part, rest), own in zip(shared.members, queries, strict=True):
        stop = start + own.shape[2]
        own_out, own_sum = _attend(own, step.lanes(layer, part, rest), groups, causal=own.shape[2] > 1)
        out, total = (
            (run_out[:, :, start:stop], run_sum[:, :, start:stop]) if len(queries) > 1 else (run_out, run_sum)
        )
        # Merge in float32: in 16 bits, a weight near 1 would lose the share of the sequence's own keys.
        weight = mx.sigmoid(total - own_sum)
        outputs.append((own_out + weight * (out - own_out)).astype(given.queries.dtype))
        start = stop
    return outputs


def _attend(queries: mx.array, pieces: list[Lanes], groups: int, causal: bool) -> tuple[mx.array, mx.array]:
    """Attends to all pieces, optionally with a causal mask of the newest n keys.

    Returns:
        The output (1, n_heads, n, value_dim) and the logsumexp of its scores (1, n_heads, n, 1), in float32.
    """
    _, heads, n, _ = queries.shape
    # Query heads that share a K/V head become rows of one product.
    scores = scores_of(queries.reshape(1, groups, -1, queries.shape[3]), pieces)
    if causal:
        size = scores.shape[3]
        seen = mx.arange(size) <= mx.arange(size - n, size)[:, None]
        scores = mx.where(mx.tile(seen, (heads // groups, 1)), scores, -mx.inf)
    total = mx.logsumexp(scores.astype(mx.float32), axis=-1, keepdims=True)
    out = weighted_sum(mx.softmax(scores, axis=-1, precise=True), pieces)
    return out.astype(mx.float32).reshape(1, heads, n, -1), total.reshape(1, heads, n, 1)
