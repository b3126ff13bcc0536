"""Measures recurrent layers: going back, and decoding, on a model of Qwen3-Next's shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_next
from mlx_lm.models.cache import make_prompt_cache as make_theirs

from benchmarks.counts import primitives, unevaluated
from benchmarks.measure import check_equal, speed, timed
from benchmarks.rows import Row
from benchmarks.setting import Setting
from mlx_kvcache import RecurrentCache
from mlx_kvcache.plugin import PromptCache, make_prompt_cache

CONTEXT, DRAFTED, KEPT = 256, 8, 4


def run(setting: Setting) -> Iterator[Row]:
    """Going back by 4 of 8 drafted tokens, and decoding, on 12 layers with random weights."""
    model = hybrid(setting.of(1024, 256))
    text = mx.random.randint(0, 500, (1, CONTEXT), key=mx.random.key(0))
    drafted = mx.random.randint(0, 500, (1, DRAFTED), key=mx.random.key(1))
    rounds = setting.of(24, 6)
    cache, again = make_prompt_cache(model), make_prompt_cache(model, rewind=0)
    for own in (cache, again):
        mx.eval(model(text, cache=own))
    yield speed(
        "hybrid.rollback",
        f"going back by {DRAFTED - KEPT} of {DRAFTED} drafted tokens",
        "ms",
        lambda: _rollback(model, cache, drafted),
        f"the forward of {DRAFTED} tokens",
        lambda: _forward(model, cache, drafted),
        rounds,
    )
    yield speed(
        "hybrid.restore",
        "the same",
        "ms",
        lambda: _rollback(model, cache, drafted),
        f"going back to a checkpoint and the forward of {KEPT} tokens",
        lambda: _restore(model, again, drafted),
        rounds,
    )
    yield _bytes(model, text)
    yield _prefill(model, setting)
    yield from _decoding(model, text, setting.of(120, 24))


def hybrid(hidden: int, layers: int = 12) -> Any:
    """Make a model of Qwen3-Next's kind: three layers in four are recurrent."""
    mx.random.seed(0)
    heads = hidden // 128
    model = qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            hidden_size=hidden,
            num_hidden_layers=layers,
            full_attention_interval=4,
            intermediate_size=3 * hidden,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            head_dim=128,
            linear_num_value_heads=2 * heads,
            linear_num_key_heads=heads,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_conv_kernel_dim=4,
            num_experts=0,
            num_experts_per_tok=0,
            decoder_sparse_step=1,
            shared_expert_intermediate_size=hidden,
            mlp_only_layers=[],
            moe_intermediate_size=hidden,
            rms_norm_eps=1e-6,
            vocab_size=512,
            rope_theta=10000.0,
            partial_rotary_factor=0.25,
            max_position_embeddings=4096,
        )
    )
    mx.eval(model.parameters())
    return model


def _states(cache: PromptCache) -> list[mx.array]:
    return [array for own in cache.pool.caches if isinstance(own, RecurrentCache) for array in own.arrays()]


def _rollback(model: Any, cache: PromptCache, drafted: mx.array) -> float:
    """The seconds to go back; the tokens that stay are dropped afterwards, so that each round is alike."""
    mx.eval(model(drafted, cache=cache), _states(cache))

    def back() -> None:
        cache.rewind(DRAFTED - KEPT)
        mx.eval(_states(cache))

    taken = timed(back)
    cache.rewind(KEPT)
    return taken


def _forward(model: Any, cache: PromptCache, drafted: mx.array) -> float:
    taken = timed(lambda: mx.eval(model(drafted, cache=cache), _states(cache)))
    cache.rewind(DRAFTED)
    return taken


def _restore(model: Any, cache: PromptCache, drafted: mx.array) -> float:
    """The seconds to go back without replay: to the state before the draft, and through the model again."""
    mx.eval(model(drafted, cache=cache), _states(cache))

    def back() -> None:
        cache.rewind(DRAFTED)
        mx.eval(model(drafted[:, :KEPT], cache=cache), _states(cache))

    taken = timed(back)
    cache.rewind(KEPT)
    return taken


def _bytes(model: Any, text: mx.array) -> Row:
    """The bytes of what is noted of the newest 64 tokens, against those of one state."""
    cache = make_prompt_cache(model)
    mx.eval(model(text, cache=cache), _states(cache))
    own, sequence = cache.pool.recurrent, cache._conversation.sequence
    leaves = [leaf.index for leaf in cache.pool.leaves if leaf.rule is None]
    states = [array for leaf in leaves for array in own.newest(leaf, sequence) if array is not None]
    state = sum(array.nbytes for array in states)
    noted = sum(array.nbytes for array in own.written(sequence)) - state
    return Row(
        "hybrid.bytes",
        "what is noted of the newest 64 tokens",
        "MB",
        noted / 1e6,
        "one state of all layers",
        state / 1e6,
        "less",
        noted / state,
    )


def _prefill(model: Any, setting: Setting) -> Row:
    """A block longer than `rewind` is read in two parts by each recurrent layer."""
    text = mx.random.randint(0, 500, (1, setting.of(512, 256)), key=mx.random.key(2))

    def seconds(cache: Any) -> float:
        return timed(lambda: mx.eval(model(text, cache=cache)))

    return speed(
        "hybrid.prefill",
        f"a block of {text.shape[1]} tokens",
        "ms",
        lambda: seconds(make_prompt_cache(model)),
        "mlx-lm's caches",
        lambda: seconds(make_theirs(model)),
        setting.of(8, 3),
    )


def _decoding(model: Any, text: mx.array, rounds: int) -> Iterator[Row]:
    ours, theirs = make_prompt_cache(model), make_theirs(model)
    check_equal(model(text, cache=ours), model(text, cache=theirs))
    token = mx.array([[5]])

    def seconds(cache: Any) -> float:
        return timed(lambda: mx.eval(model(token, cache=cache)))

    yield speed(
        "hybrid.decode",
        f"a token after {CONTEXT}, the model",
        "ms",
        lambda: seconds(ours),
        "mlx-lm's caches",
        lambda: seconds(theirs),
        rounds,
    )
    with unevaluated(ours):
        counts = [sum(primitives(model(token, cache=cache)).values()) for cache in (ours, theirs)]
    yield Row(
        "hybrid.primitives",
        "primitives of a token, views left out",
        "",
        counts[0],
        "mlx-lm's caches",
        counts[1],
        "less",
        counts[0] / counts[1],
    )
