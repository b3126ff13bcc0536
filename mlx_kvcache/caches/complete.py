"""Whether a forward pass has put every layer that later tokens attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import CacheError

if TYPE_CHECKING:
    from .step import Step


def check_complete(step: Step) -> None:
    """Raise CacheError where a layer has tokens without keys and values: of this step, or of earlier ones."""
    left = sorted(layer for layer, buffers in step.store.layers.items() if buffers.written != step.name)
    if left:
        raise CacheError(
            f"layers {left} were put in earlier batches but not in this one of {step.n} tokens, which is "
            "taken out again: later tokens would attend to cells that nobody wrote; put every layer in every "
            "batch"
        )
    earlier = next((part for part in step.parts if part.begin), None)
    if step.opened and earlier:
        raise CacheError(
            f"layers {sorted(step.opened)} were not put for the {earlier.begin} tokens that sequence "
            f"{earlier.sequence} has, but in this batch of {step.n} tokens, which is taken out again: it "
            "would attend to cells that nobody wrote; put every layer in every batch"
        )


def over(n: int) -> CacheError:
    """What to raise where something is put after the block of a `forward`."""
    return CacheError(
        f"the forward pass of {n} tokens is over, so nothing more can be put: put inside its `with` block; "
        "for other tokens start_forward must come first"
    )
