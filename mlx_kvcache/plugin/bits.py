"""In how many bits the layers of a model store keys and values, as `make_prompt_cache` is told."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..arguments import whole
from ..quantisation import Bits, Quantisation
from .layout import Layout, Leaf

KvBits = Bits | Callable[[int], Bits]
"""Of all layers, or a function of the layer: its index in the model's cache list."""

KvFloat = Iterable[int] | Literal["last"]
"""Indices of layers that stay in float, negative ones from the end; "last" is the last with keys."""


def reusable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `make_prompt_cache` for several caches: the first would use an iterator of layers up."""
    layers = options.get("kv_float", ())
    is_listed = isinstance(layers, str) or not isinstance(layers, Iterable)
    return options if is_listed else options | {"kv_float": tuple(layers)}


@dataclass(frozen=True)
class _ByLeaf:
    """Bits of each leaf. A value and not a function, so that pools of the same can be told."""

    bits: tuple[Bits, ...]

    def __call__(self, leaf: int) -> Bits:
        return self.bits[leaf]


def quantisation_of(
    layout: Layout,
    mirrored: Container[int],
    kv_bits: KvBits,
    group_size: int,
    kv_float: KvFloat,
    after: int,
) -> Quantisation | None:
    """What a model's pool is to be made with; None where all stays in float.

    Args:
        mirrored: leaves whose values must be stored as their keys are.

    Raises:
        ValueError: as `Quantisation`, or a layer that the model does not have.
    """
    (after,) = whole(quantise_after=after)
    in_float = _float_layers(layout, kv_float)
    bits = tuple(
        None if leaf.rule is None or leaf.layer in in_float else _bits_of(leaf, kv_bits, mirrored)
        for leaf in layout.leaves
    )
    # Checks all of them, also those that are to be float.
    by_leaf = Quantisation(_ByLeaf(bits), group_size, after)
    for leaf in layout.leaves:
        by_leaf.of(leaf.index)
    keyed = {own for own, leaf in zip(bits, layout.leaves, strict=True) if leaf.rule is not None}
    if keyed <= {None}:
        return None
    return Quantisation(keyed.pop(), group_size, after) if len(keyed) == 1 else by_leaf


def _bits_of(leaf: Leaf, kv_bits: KvBits, mirrored: Container[int]) -> Bits:
    """Bits of a leaf's keys and values; one number where they are the same."""
    bits = kv_bits(leaf.layer) if callable(kv_bits) else kv_bits
    if not isinstance(bits, (tuple, list)):
        return bits
    if len(bits) != 2:
        raise ValueError(f"kv_bits of keys and of values are two numbers, got {bits}")
    keys, values = bits
    if leaf.index in mirrored:
        values = keys
    return keys if keys == values else (keys, values)


def _float_layers(layout: Layout, kv_float: KvFloat) -> set[int]:
    """Layers whose keys and values stay in float."""
    keyed = [leaf.layer for leaf in layout.leaves if leaf.rule is not None]
    if kv_float == "last":
        return {keyed[-1]} if keyed else set()
    if isinstance(kv_float, str) or not isinstance(kv_float, Iterable):
        raise ValueError(f'kv_float must be indices of layers, or "last", got {kv_float!r}')
    count = len(layout.entries)
    chosen = set()
    for layer in kv_float:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"kv_float names layer {layer!r}; there are {count}")
        chosen.add(layer % count)
    return chosen
