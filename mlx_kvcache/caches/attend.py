"""Attention by run: each sequence on its own history, and each stretch of a block on what it sees."""

from __future__ import annotations

import mlx.core as mx

from .step import Part, Step, take


def attend(
    step: Step,
    layer: int,
    queries: mx.array,
    keys: mx.array | None,
    values: mx.array | None,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Put, unless keys and values are None, and attend. Shapes are those of `mlx_kvcache.attention`."""
    if keys is not None and values is not None:
        if step.is_plain:
            keys, values = step.exchange(layer, keys, values)
            return _stretches(step, step.parts[0], queries, keys, values, scale, sinks)
        step.put(layer, keys, values)
    step.check_put(layer)
    outputs = []
    for part in step.parts:
        keys, values = step.history(layer, part)
        outputs.append(_stretches(step, part, take(queries, part.rows), keys, values, scale, sinks))
    if len(outputs) == 1 and step.parts[0].rows is None:
        return outputs[0]
    order = [index for part in step.parts for index in part.indices]
    back = sorted(range(step.n), key=order.__getitem__)
    joined = mx.concatenate(outputs, axis=2)
    return joined if back == list(range(step.n)) else mx.take(joined, mx.array(back), axis=2)


def _stretches(
    step: Step,
    part: Part,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """A long block attends in stretches: what a window or a chunk hides is then never multiplied."""
    sdpa = mx.fast.scaled_dot_product_attention
    stretches = step.stretches(part)
    if len(stretches) == 1:
        return sdpa(queries, keys, values, scale=scale, mask=stretches[0].mask, sinks=sinks)
    return mx.concatenate(
        [
            sdpa(
                queries[:, :, s.queries],
                keys[:, :, s.keys],
                values[:, :, s.keys],
                scale=scale,
                mask=s.mask,
                sinks=sinks,
            )
            for s in stretches
        ],
        axis=2,
    )
