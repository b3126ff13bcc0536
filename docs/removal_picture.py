"""The picture of a removal from the middle, by an engine's cache and by a prompt cache of the plug-in."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import mlx.core as mx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mlx_lm.models import llama

from mlx_kvcache import Batch, CausalCache, rope_shift
from mlx_kvcache.caches.base import PlanningCache
from mlx_kvcache.caches.causal import PositionalCache
from mlx_kvcache.plugin import make_prompt_cache

TOKENS, BEGIN, END = 24, 6, 12
LEFT = [*range(BEGIN), *range(END, TOKENS)]
"""The tokens that stay, by their first positions."""
KEPT, GONE, ROTATED = "#a9c7e8", "#ececec", "#c25b12"


class Strip(NamedTuple):
    """A row of the picture: for each position the token there, and whether its key was rotated."""

    title: str
    tokens: list[int]
    rotated: list[bool]
    offset: int


def engine() -> Strip:
    """Later keys are rotated back."""
    cache = CausalCache(shift=rope_shift(8))
    cache.init(mx.float32, capacity=2 * TOKENS)
    cache.start_forward(Batch.run(0, 0, TOKENS))
    keys = mx.random.normal((1, 1, TOKENS, 8))
    cache.put(keys, keys)
    before = stored(cache, 0)
    cache.remove(0, BEGIN, END)
    title = f"CausalCache.remove(0, {BEGIN}, {END}): later keys are rotated by {BEGIN - END}"
    return Strip(title, LEFT, rotated(before, stored(cache, 0)), cache.end(0))


def plug_in() -> Strip:
    """The few keys before the gap are rotated ahead, and so is what the model is told to go on at."""
    model = llama.Model(_ARGUMENTS)
    cache = make_prompt_cache(model)
    model(mx.arange(TOKENS)[None], cache=cache)
    before = stored(cache.pool.caches[0], cache.sequence)
    cache.remove(BEGIN, END)
    after = stored(cache.pool.caches[0], cache.sequence)
    title = f"PromptCache.remove({BEGIN}, {END}): keys before the gap are rotated by {END - BEGIN}"
    return Strip(title, LEFT, rotated(before, after), cache[0].offset)


def stored(cache: PlanningCache, sequence: int) -> mx.array:
    """The keys of a sequence (tokens, features) as they lie in the first layer."""
    assert isinstance(cache, PositionalCache)
    pairs = cache._store.layers[0].pairs
    parts = [
        pairs[span.segment].keys[0][0, 0, span.start : span.stop] for span in cache._table[sequence].spans
    ]
    return mx.concatenate(parts)


def rotated(before: mx.array, after: mx.array) -> list[bool]:
    """For each token that stays, whether its key is another now."""
    found: list[bool] = mx.any(before[mx.array(LEFT)] != after, axis=1).tolist()  # type: ignore[assignment]
    return found


_ARGUMENTS = llama.ModelArgs(
    model_type="llama",
    hidden_size=32,
    num_hidden_layers=1,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    rms_norm_eps=1e-5,
    vocab_size=TOKENS,
)


def removal() -> Figure:
    """Before, and after by both ways; numbers are tokens, by their positions before."""
    mx.random.seed(0)
    before = Strip("before", list(range(TOKENS)), [False] * TOKENS, TOKENS)
    figure: Figure
    figure, axes = plt.subplots(3, 1, figsize=(9, 4), sharex=True)
    for axis, strip in zip(axes, (before, engine(), plug_in()), strict=True):
        _draw(axis, strip)
    figure.legend(
        handles=[
            Patch(color=KEPT, label="key stays as it was stored"),
            Patch(color=ROTATED, label="key is rotated"),
            Patch(color=GONE, label="removed"),
        ],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    return figure


def _draw(axis: Axes, strip: Strip) -> None:
    for position, (token, is_rotated) in enumerate(zip(strip.tokens, strip.rotated, strict=True)):
        is_gone = len(strip.tokens) == TOKENS and BEGIN <= token < END
        colour = GONE if is_gone else ROTATED if is_rotated else KEPT
        axis.add_patch(Rectangle((position + 0.04, 0), 0.92, 1, color=colour))
        text = "w" if is_rotated else "black"
        axis.text(position + 0.5, 0.5, str(token), ha="center", va="center", color=text, fontsize=8)
    axis.text(len(strip.tokens) + 0.3, 0.5, f"next: {strip.offset}", va="center", fontsize=8)
    axis.set_xlim(0, TOKENS + 3)
    axis.set_ylim(-0.1, 1.1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(strip.title, fontsize=9, loc="left")
    axis.spines[["top", "right", "bottom", "left"]].set_visible(False)
