"""Attention by run: each sequence on its own history, and each stretch of a block on what it sees."""

from __future__ import annotations

import mlx.core as mx

from .keyvalue import Attending
from .step import Part, Step, take


def attend(step: Step, layer: int, given: Attending) -> mx.array:
    """Put, unless keys and values are None, and attend; (1, n_heads, n, value_dim) in batch order."""
    if given.keys is not None and given.values is not None:
        if step.is_plain:
            history = step.exchange(layer, given.keys, given.values)
            return _stretches(step, step.parts[0], given.queries, history, given)
        step.put(layer, given.keys, given.values)
    step.check_put(layer)
    outputs = [
        _stretches(step, part, take(given.queries, part.rows), step.history(layer, part), given)
        for part in step.parts
    ]
    if len(outputs) == 1 and step.parts[0].rows is None:
        return outputs[0]
    order = [index for part in step.parts for index in part.indices]
    back = sorted(range(step.n), key=order.__getitem__)
    joined = mx.concatenate(outputs, axis=2)
    return joined if back == list(range(step.n)) else mx.take(joined, mx.array(back), axis=2)


def _stretches(
    step: Step, part: Part, queries: mx.array, history: tuple[mx.array, mx.array], given: Attending
) -> mx.array:
    """A long block attends in stretches: what a window or a chunk hides is then never multiplied."""
    sdpa, (keys, values) = mx.fast.scaled_dot_product_attention, history
    scale, sinks = given.scale, given.sinks
    stretches = step.stretches(part)
    if len(stretches) == 1:
        return sdpa(queries, keys, values, scale=scale, mask=stretches[0].mask, sinks=sinks)
    outputs = [
        sdpa(queries[:, :, q], keys[:, :, k], values[:, :, k], scale=scale, mask=mask, sinks=sinks)
        for q, k, mask in stretches
    ]
    return mx.concatenate(outputs, axis=2)
