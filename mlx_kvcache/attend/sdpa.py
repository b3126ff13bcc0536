"""Attention of a batch: each sequence attends to its own keys, by the fastest way for these.

Long shared prefixes use cascade attention. Single queries use plain products on a CPU, and over quantized
cells on every device. All else uses `mx.fast.scaled_dot_product_attention`, in stretches of queries where
that saves products.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from ..cells.visibility import Causal, Chunk, Rule
from ..storage import codec
from ..storage.buffers import Buffers
from ..storage.masks import Mask, array_mask, positions_of
from .cascade import attend_shared, shared_runs
from .part import Attending, Part, take
from .products import STRETCH, Apart, attend_all, attend_levels, attend_single
from .step import Step

SHORTEST = 64
"""The smallest stretch, in queries. Smaller ones cost more than they save."""


class Stretch(NamedTuple):
    """Consecutive queries of a part, the keys that at least one of them sees, and their mask."""

    queries: slice
    keys: slice
    mask: Mask


def cut(rule: Rule, part: Part, whole: Stretch) -> list[Stretch]:
    """Cuts the queries of a part, by rising position, into stretches. Returns [whole] unless that pays."""
    borders = _borders(rule, part)
    return [_stretch(rule, part, a, b) for a, b in pairwise(borders)] if len(borders) > 2 else [whole]


def _borders(rule: Rule, part: Part) -> list[int]:
    """The positions at which stretches begin, and the end of the last one."""
    whole = [part.begin, part.end]
    if rule.sinks or any(before[1] != after[0] for before, after in pairwise(part.ranges)):
        return whole
    if isinstance(rule, Causal):
        return [*range(part.begin, part.end, STRETCH), part.end] if codec.is_cpu() else whole
    if isinstance(rule, Chunk):
        inner = range(part.begin - part.begin % rule.size + rule.size, part.end, rule.size)
        # Many small chunks are faster in one product with a mask.
        return [part.begin, *inner, part.end] if rule.size >= SHORTEST else whole
    hides = rule.lower(part.end - 1) > max(0, rule.lower(part.begin))
    return [*range(part.begin, part.end, max(SHORTEST, rule.size // 4)), part.end] if hides else whole


def _stretch(rule: Rule, part: Part, begin: int, end: int) -> Stretch:
    """The stretch of the queries at positions [begin, end)."""
    first = part.ranges[0][0]
    low = max(first, rule.lower(begin))
    mask: Mask = None if end - begin == 1 else "causal"
    if rule.lower(end - 1) > low:
        mask = array_mask(rule, positions_of([(begin, end)]), positions_of([(low, end)]))
    return Stretch(slice(begin - part.begin, end - part.begin), slice(low - first, end - first), mask)


def attend(step: Step, layer: int, given: Attending) -> mx.array:
    """Puts keys and values unless they are None, and attends; `given` is checked.

    Returns:
        (1, n_heads, n, value_dim), in batch order.
    """
    if given.keys is not None and given.values is not None:
        if step.run and not (step.is_packed(step.parts[0]) and step.is_decoding):
            history = step.exchange(layer, given.keys, given.values)
            assert history is not None
            if step.is_decoding and given.sinks is None and codec.is_cpu():
                return attend_single(given.queries, *history, given.scale)
            return _stretches(step, step.parts[0], given.queries, history, given)
        step.put(layer, given.keys, given.values)
    buffers = step.written(layer)
    # By sequence; the outputs of a stack stand under its first one.
    found: dict[int, mx.array] = {}
    for number, stack in enumerate(step.stacks):
        own = take(given.queries, stack.rows).swapaxes(0, 2)
        together = attend_stack(step, layer, number, own, given.scale, given.sinks).swapaxes(0, 2)
        if len(stack.parts) == step.n and stack.rows is None:
            return together
        found[stack.parts[0].sequence] = together
    left = step.apart
    if given.sinks is None:
        for shared in step.once(shared_runs):
            outputs = attend_shared(step, layer, shared, given)
            found |= {part.sequence: out for (part, _), out in zip(shared.members, outputs, strict=True)}
            left = [part for part in left if part.sequence not in found]
        if single := _decodes(step, buffers, left):
            outputs = _decoded(step, layer, single, given)
            if len(single) == step.n:
                return _in_batch_order(step, outputs, given)
            shape = 1, given.queries.shape[1], 1, -1
            found |= {p.sequence: out.reshape(shape) for p, out in zip(single, outputs, strict=True)}
    for part in left:
        if part.sequence not in found:
            queries, history = take(given.queries, part.rows), step.history(layer, part)
            found[part.sequence] = _stretches(step, part, queries, history, given)
    outputs = [found[part.sequence] for part in step.parts if part.sequence in found]
    if len(outputs) == 1 and step.parts[0].rows is None:
        return outputs[0]
    back = step.once(_batch_order)
    joined = mx.concatenate(outputs, axis=2)
    return joined if back is None else mx.take(joined, back, axis=2)


def attend_run(step: Step, layer: int, queries: mx.array, scale: float) -> mx.array:
    """Attends from the only token (1, n_heads, 1, head_dim) of a step with a `run`, which was put."""
    assert step.run is not None
    segment, _, seen = step.run
    buffers, (_, heads, _, dim) = step.written(layer), queries.shape
    pieces = buffers.pairs[segment].newest(seen)
    # Query heads that share a K/V head become rows of one product.
    rows = queries.reshape(1, buffers.form.heads, -1, dim)
    return attend_all(rows, pieces, scale).reshape(1, heads, 1, -1).astype(queries.dtype)


def attend_stack(
    step: Step, layer: int, number: int, queries: mx.array, scale: float, sinks: mx.array | None
) -> mx.array:
    """Attends from the single queries (rows, n_heads, 1, head_dim) of a stack's rows, which were put.

    Returns:
        (rows, n_heads, 1, value_dim).
    """
    stack, buffers = step.stacks[number], step.written(layer)
    pair, mask = buffers.pairs[stack.segment], step.once(_stack_mask, number) if stack.padding else None
    if not (stack.prefix or stack.others or pair.is_packed or codec.is_cpu()):
        keys, values = pair.keys[0][stack.seen], pair.values[0][stack.seen]
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    else:
        # Query heads that share a K/V head become rows of one product.
        (n, heads, _, dim), groups = queries.shape, buffers.form.heads
        rows = (queries * scale).reshape(n, groups, heads // groups, dim)
        prefix, apart = buffers.lanes(stack.prefix), None
        if stack.others:
            cells = [(size, buffers.lanes(spans)) for size, spans in stack.others]
            apart = Apart(cells, *step.once(_stack_order, number))
        own_sinks = None if sinks is None else sinks.reshape(groups, heads // groups)
        out = attend_levels(rows, pair.newest(stack.seen), mask, prefix, apart, own_sinks)
        out = out.reshape(n, heads, 1, -1)
    return out.astype(queries.dtype)


def _stack_mask(step: Step, number: int) -> mx.array | None:
    return step.stacks[number].mask()


def _stack_order(step: Step, number: int) -> tuple[mx.array | None, mx.array | None]:
    """The indices that sort a stack's rows by the cells outside it, and those that undo it."""
    order = step.stacks[number].order
    return (None, None) if order is None else (mx.array(order), mx.argsort(mx.array(order)))


def _batch_order(step: Step) -> mx.array | None:
    """The indices that bring outputs into batch order. None if they are in order.

    Outputs are concatenated by part, and those of a stack stand where its first part does.
    """
    pieces = {part.sequence: [part] for part in step.parts}
    for stack in step.stacks:
        for part in stack.parts[1:]:
            pieces[part.sequence] = []
        pieces[stack.parts[0].sequence] = stack.parts
    order = [index for parts in pieces.values() for part in parts for index in part.indices]
    back = sorted(range(step.n), key=order.__getitem__)
    return None if back == list(range(step.n)) else mx.array(back)


def _decodes(step: Step, buffers: Buffers, left: list[Part]) -> list[Part]:
    """The parts with a single query for which plain products are faster than MLX's own attention."""
    if codec.is_cpu():
        return left if step.is_decoding else []
    # MLX's own attention would decode quantized cells first.
    if not (buffers.form.is_packed and step.is_decoding):
        return []
    return [part for part in left if step.is_packed(part)]


def _decoded(step: Step, layer: int, parts: list[Part], given: Attending) -> list[mx.array]:
    """The outputs (1, n_kv_heads, m, value_dim) of single queries, with m query heads for each K/V head."""
    _, heads, n, dim = given.queries.shape
    groups = step.store.layers[layer].form.heads
    # Query heads that share a K/V head become rows of one product.
    rows = (given.queries * given.scale).swapaxes(1, 2).reshape(n, groups, heads // groups, dim)
    each, dtype = mx.split(rows, n), given.queries.dtype
    return [
        attend_all(each[part.indices[0]], step.lanes(layer, part, part.cells)).astype(dtype) for part in parts
    ]


def _in_batch_order(step: Step, outputs: list[mx.array], given: Attending) -> mx.array:
    """The outputs of single queries, one for each part, as (1, n_heads, n, value_dim) in batch order."""
    by_index = dict(zip((part.indices[0] for part in step.parts), outputs, strict=True))
    joined = mx.concatenate([by_index[index] for index in range(step.n)])
    return joined.reshape(1, step.n, given.queries.shape[1], -1).swapaxes(1, 2)


def _stretches(
    step: Step, part: Part, queries: mx.array, history: tuple[mx.array, mx.array], given: Attending
) -> mx.array:
    """Attends with MLX's own attention, in stretches: keys outside a window or chunk are not multiplied."""
    sdpa, (keys, values) = mx.fast.scaled_dot_product_attention, history
    scale, sinks = given.scale, given.sinks
    stretches = step.once(_cut, part)
    if len(stretches) == 1:
        out = sdpa(queries, keys, values, scale=scale, mask=stretches[0].mask, sinks=sinks)
        return out.astype(queries.dtype)
    outputs = [
        sdpa(queries[:, :, q], keys[:, :, k], values[:, :, k], scale=scale, mask=mask, sinks=sinks)
        for q, k, mask in stretches
    ]
    return mx.concatenate(outputs, axis=2).astype(queries.dtype)


def _cut(step: Step, part: Part) -> list[Stretch]:
    whole = Stretch(slice(None), slice(None), step.own_mask(part))
    return [whole] if step.later.intersection(part.indices) else cut(step.rule, part, whole)
