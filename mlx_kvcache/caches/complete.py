"""Whether a forward pass has put every layer that later tokens attend to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cells.spans import Sequence
from ..errors import CacheError

if TYPE_CHECKING:
    from .step import Step


def check_complete(step: Step, before: Mapping[int, Sequence | None]) -> None:
    """Raise CacheError where tokens have no keys and values in some layer.

    Args:
        step: in which all layers have been put that will be.
        before: what was held of its sequences before it.
    """
    left = sorted(layer for layer, buffers in step.store.layers.items() if buffers.written != step.name)
    if left:
        raise CacheError(
            f"layers {left} were put in earlier batches but not in this one of {step.n} tokens, which is "
            "taken out again: later tokens would attend to cells that nobody wrote; put every layer in every "
            "batch"
        )
    for sequence, old in before.items():
        # Windows and chunks may hold nothing of what was there.
        if step.opened and old and old.spans:
            raise CacheError(
                f"layers {sorted(step.opened)} were not put for the {old.end} tokens of sequence {sequence}, "
                f"but in this batch of {step.n} tokens, which is taken out again: it would attend to cells "
                "that nobody wrote; put every layer in every batch"
            )


def over(n: int) -> CacheError:
    """What to raise where something is put after the block of a `forward`."""
    return CacheError(
        f"the forward pass of {n} tokens is over, so nothing more can be put: put inside its `with` block; "
        "for other tokens start_forward must come first"
    )
