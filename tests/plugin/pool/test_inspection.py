"""What is told about who holds which cells."""

from __future__ import annotations

from mlx_kvcache.cells.visibility import Causal, Window
from mlx_kvcache.plugin import holdings, make_prompt_cache
from tests.plugin.configurations import build
from tests.plugin.running import logits_of
from tests.plugin.tiny import tiny_llama

TOKENS = [(7 * i) % 90 for i in range(40)]


def test_forks_share_cells() -> None:
    model = tiny_llama()
    cache = make_prompt_cache(model)
    logits_of(model, cache, TOKENS)
    branch = cache.fork()
    branch.rewind_to(30)
    logits_of(model, branch, TOKENS[:5])
    [held] = holdings(cache.pool)
    assert held.rule == Causal()
    assert held.layers == len(model.layers)
    assert held.name == "full attention"
    [whole] = held.runs[cache.sequence]
    shared, own = held.runs[branch.sequence]
    assert (whole.position, whole.length) == (0, 40)
    assert shared == whole._replace(length=30)
    assert (own.position, own.length) == (30, 5)
    assert own.segment != whole.segment
    assert set(held.segments) == {whole.segment, own.segment}
    assert all(span.stop <= held.segments[span.segment] for span in (whole, shared, own))


def test_each_kind_of_layer_has_its_own() -> None:
    model = build("gemma3_text")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TOKENS)
    held = holdings(cache.pool)
    assert {type(holding.rule) for holding in held} == {Causal, Window}
    assert sum(holding.layers for holding in held) == len(model.layers)
    assert any(holding.name.startswith("window ") for holding in held)


def test_recurrent_layers_hold_states() -> None:
    model = build("qwen3_next")
    cache = make_prompt_cache(model)
    logits_of(model, cache, TOKENS, 10)
    recurrent = next(holding for holding in holdings(cache.pool) if holding.rule is None)
    assert recurrent.name == "recurrent"
    assert recurrent.runs == {}
    assert recurrent.checkpoints[cache.sequence][-1] == 40


def test_packed_segments_are_told() -> None:
    model = tiny_llama(head_dim=64)
    cache = make_prompt_cache(model, kv_bits=8)
    logits_of(model, cache, TOKENS)
    [held] = holdings(cache.pool)
    assert held.packed == set(held.segments)


def test_nothing_is_left_of_what_is_closed() -> None:
    model = tiny_llama()
    cache, other = make_prompt_cache(model), make_prompt_cache(model)
    for each in (cache, other):
        logits_of(model, each, TOKENS)
    sequence = cache.sequence
    cache.close()
    assert other.pool.nbytes > 0
    [held] = holdings(other.pool)
    assert sequence not in held.runs
    assert len(held.segments) == 1
